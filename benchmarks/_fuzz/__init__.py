"""A fuzzer of file readers: what changes files, what reads them, and what watches the reading."""
