"""What the processes of a training do together: begin with one state, and end."""

from __future__ import annotations

from ..quant import QuantTuneError


def leave_together(accelerator) -> None:
    """Close the process group once every process has come this far.

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


def from_first(accelerator, make):
    """What ``make`` gives in the first process, in all of them; machines may share no disk.

    Raises QuantTuneError in all of them if it failed there.
    """
    if accelerator.num_processes == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    found = [None, None]
    if accelerator.is_main_process:
        try:
            found[0] = make()
        except Exception as error:  # the others wait for this process's word
            found[1] = str(error) or type(error).__name__
    value, wrong = broadcast_object_list(found)
    if wrong is not None:
        raise QuantTuneError(wrong)
    return value
