"""The starter model: a small text-to-image model, its weights, its recipe and its measurements."""
