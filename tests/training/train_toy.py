"""Run as a script by the tests: train the toy, alone or under `accelerate launch`."""

import argparse
import os
import signal

import torch

from quanttune.tests.training import lora_toy
from quanttune.tests.training.toy import trainer

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)

    def callback(progress):
        if progress.record.step == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return progress.record.step == options.stop_at

    if options.lora:
        with lora_toy.trainer(options.folder, batch_size=options.batch) as run:
            run.run(callback)
    else:
        trainer(options.folder, batch_size=options.batch).run(callback)
