"""Run as a script by the test beside it: readers that break what the fuzzer watches for."""

import json
import os
import signal
import tempfile
import time

from quanttune.benchmarks._fuzz.run import Reader, campaign
from quanttune.quant import QuantTuneError

SEED = {"a.json": b'{"size": 3, "name": "x"}'}


def parsed(path):
    """What a good reader would do."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if set(found) != {"size", "name"} or type(found["size"]) is not int:
            raise ValueError
        return found
    except (ValueError, TypeError, RecursionError) as error:
        raise QuantTuneError(f"The file {path} is damaged; save it again.") from error


def check(files, found):
    """Accepted is what the file says."""
    return None if found == json.loads(files["a.json"]) else "something else than the file says"


def good(folder, target):
    return parsed(folder / target)


def raises(folder, target):
    found = json.loads((folder / target).read_text("utf-8"))
    return {"size": found["size"], "name": found["name"]}


def hangs(folder, target):
    while b"size" not in (folder / target).read_bytes():
        pass
    return good(folder, target)


def waits(folder, target):
    while b"size" not in (folder / target).read_bytes():
        time.sleep(0.1)  # takes no processor time
    return good(folder, target)


def swells(folder, target):
    found = good(folder, target)
    return found if found["size"] == 3 else [bytearray(os.urandom(2**20)) * 300, found][1]


def guesses(folder, target):
    try:
        return good(folder, target)
    except QuantTuneError:
        return {"size": 3, "name": "x"}


def leaves(folder, target):
    with open(os.path.join(tempfile.gettempdir(), "left.tmp"), "w") as file:
        file.write("x")
    return good(folder, target)


def dies(folder, target):
    try:
        return good(folder, target)
    except QuantTuneError:
        os.kill(os.getpid(), signal.SIGSEGV)


def mumbles(folder, target):
    try:
        return good(folder, target)
    except QuantTuneError as error:
        raise QuantTuneError("It is damaged.") from error


def traces(folder, target):
    try:
        return good(folder, target)
    except QuantTuneError as error:
        raise QuantTuneError(f"{error} Traceback (most recent call last).") from error


BROKEN = {"good": good, "wrong exception": raises, "hang": hangs, "crash": dies, "memory": swells,
          "silent acceptance": guesses, "left behind": leaves, "no sentence": mumbles,
          "no sentence, a trace": traces, "crash, waiting": waits}

if __name__ == "__main__":
    found = {}
    for kind, read in BROKEN.items():
        # Only a reader that never ends may meet a limit of time, however busy the machine is.
        limits = {"seconds": 0.2 if read is hangs else 60, "silent": 2 if read is waits else 120}
        outcome = campaign(Reader(kind, lambda: [SEED], read, check), 24, 0, **limits)
        found[kind] = sorted({failure["kind"] for failure in outcome.failures})
        assert outcome.files == 24
        if kind == "good":
            assert outcome.refused and outcome.accepted
            assert outcome.refused + outcome.accepted == 24
    print(json.dumps(found))
