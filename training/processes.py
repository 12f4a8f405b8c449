"""The end of a training that several processes share."""

from __future__ import annotations


def leave_together(accelerator) -> None:
    """Close the trackers and the process group once every process has come this far.

    Args:
        accelerator: the `accelerate.Accelerator` of the training; alone or one of several.

    A process that exits while another still reads from it, or with its group's background threads
    alive, can bring either down after all the work is done.
    """
    import torch.distributed as dist

    if accelerator.num_processes > 1 and dist.is_initialized():
        if dist.get_backend() == "gloo":
            # Answered by rank 0 one by one: no rank waits for a message of one that has gone.
            dist.monitored_barrier()
        else:
            accelerator.wait_for_everyone()
    accelerator.end_training()
