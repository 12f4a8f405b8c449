"""Run as a script by `test_security.py`: the main nodes, every file and connection watched.

Exits with 3, and tells what it was, when something is written outside of the folder that is given,
when anything but this computer is connected to or looked up, when anything is unpickled, or when a
program is started.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,),
           "os.link": (1,), "os.symlink": (1,), "os.truncate": (0,), "shutil.rmtree": (0,),
           "shutil.move": (0, 1), "shutil.copyfile": (1,), "shutil.copytree": (1,),
           "tempfile.mkstemp": (0,), "tempfile.mkdtemp": (0,)}
"""Events that change what a disk holds, and which of their arguments are the paths."""
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
ASKED = ("uname", "fc-list", "ldconfig", "gcc", "cc", "ld")
"""Programs that libraries ask about the computer: Python's `platform`, matplotlib for its fonts,
ctypes for the C library. None is given anything from a file or a workflow."""
found: list[str] = []
state = {"on": False, "roots": ()}


def inside(path) -> bool:
    """Whether a path is one of those that may be written."""
    if isinstance(path, int) or path is None:
        return True
    path = os.path.realpath(os.fsdecode(path))
    return path == os.devnull or any(
        path == root or path.startswith(root + os.sep) for root in state["roots"])


def local(address) -> bool:
    """Whether an address is this computer's."""
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode() if isinstance(host, bytes) else host
    return host in (None, "", "localhost", "::1", "127.0.0.1") or str(host).startswith("/")


def hook(event, arguments):
    """What Python tells of each event, see its documentation of `sys.addaudithook`."""
    if not state["on"]:
        return
    fault = ""
    if event == "open":
        path, mode, flags = arguments
        writes = any(c in mode for c in "wax+") if isinstance(mode, str) else flags & WRITING
        if writes and not inside(path):
            fault = f"writes {path}"
    elif event in CHANGES:
        paths = [arguments[i] for i in CHANGES[event] if i < len(arguments)]
        if not all(map(inside, paths)):
            fault = f"{event} {paths}"
    elif event in ("socket.connect", "socket.sendto") and not local(arguments[1]):
        fault = f"connects to {arguments[1]}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not local(arguments[0]):
        fault = f"looks up {arguments[0]}"
    elif event == "pickle.find_class":
        fault = f"unpickles {arguments}"
    elif event.startswith(PROGRAMS) and os.path.basename(str(arguments[0])) not in ASKED:
        fault = f"starts {arguments[0]}"
    if fault:
        found.append(f"{event}: {fault}")
        print(f"forbidden: {fault}", flush=True)
        if event.startswith("socket.") or event == "pickle.find_class":
            raise PermissionError(fault)


def plant(kind: str, folder: Path) -> None:
    """Break a promise."""
    outside = folder.parent / f"{folder.name}-outside"
    if kind == "write":
        outside.write_text("x")
    elif kind == "rename":
        (folder / "a").write_text("x")
        os.rename(folder / "a", outside)
    elif kind == "connect":
        import socket

        with socket.socket() as connection:
            connection.connect(("192.0.2.1", 80))
    elif kind == "resolve":
        import socket

        socket.getaddrinfo("example.invalid", 80)
    elif kind == "unpickle":
        import pickle

        pickle.loads(pickle.dumps(Path("x")))  # noqa: S301
    elif kind == "program":
        import subprocess

        subprocess.run([sys.executable, "-c", ""], check=True)
    print(f"planted {kind}" if not found else "")


def work(folder: Path) -> None:
    """Load, quantize, save, load again, train, route, measure, export and report."""
    import torch

    from quanttune.tests.harness.inprocess import pack_nodes, run_node

    nodes = pack_nodes()

    def node(name, **inputs):
        return run_node(nodes[f"QuantTune{name}"], **inputs).args

    state["on"] = True
    model, clip, vae = node("LoadStarterModel")[:3]
    quantized = node("QuantizeUNet", model=model, bits="4")[0]
    path = Path(node("SaveQuantizedUNet", model=quantized, filename_prefix="quanttune/x")[0])
    loaded = node("LoadQuantizedUNet", unet_name=path.name)[0]
    images = node("TrainingImages", folder="starter: " + sorted(
        p.name for p in (Path(nodes_folder()) / "subjects").iterdir())[0], resolution=128)[0]
    scales = node("TrainScales", model=loaded, images=images, clip=clip, vae=vae, steps=2,
                  num_experts=1, batch_size=1, run_name="x")[0]
    saved = Path(node("SaveScales", scales=scales, filename_prefix="quanttune_scales/x")[0])
    routed = node("ApplyScales", model=loaded, scale_name=saved.name)[0]
    node("SaveForStock", model=quantized, filename_prefix="stock")
    node("ExportUNet", model=routed, filename_prefix="merged")
    node("SaveReport", report_a="words", filename_prefix="reports/x")
    node("LoadUpscaler")
    with torch.inference_mode():
        positive = clip.encode_from_tokens_scheduled(clip.tokenize("a red star"))
        import comfy.sample

        noise = torch.zeros(1, 4, 16, 16)
        latent = comfy.sample.sample(routed, noise + 1, 2, 1.0, "euler", "normal", positive,
                                     positive, noise, disable_pbar=True)
        vae.decode(latent)
    state["on"] = False


def nodes_folder() -> str:
    """The folder of the starter."""
    from quanttune.host.folders import STARTER

    return str(STARTER)


def main() -> int:
    """Watch, work, tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plant")
    options = parser.parse_args()
    folder = options.folder.resolve()
    for name in ("input", "output", "temp", "user", "models"):
        (folder / name).mkdir(exist_ok=True)
    # What libraries keep for themselves (compiled kernels, fonts) goes where the host's owner says.
    os.environ |= {"TMPDIR": str(folder / "temp"), "MPLCONFIGDIR": str(folder / "temp"),
                   "TORCHINDUCTOR_CACHE_DIR": str(folder / "temp" / "compiled")}
    tempfile.tempdir = str(folder / "temp")
    state["roots"] = tuple(str(folder / n) for n in ("input", "output", "temp", "user", "models"))
    sys.addaudithook(hook)
    if options.plant:
        state["on"] = True
        try:
            plant(options.plant, folder)
        except PermissionError:
            pass
        state["on"] = False
    else:
        from comfy.cli_args import args

        args.cpu = True
        import folder_paths

        for name in ("input", "output", "temp", "user"):
            setattr(folder_paths, f"{name}_directory", str(folder / name))
        folder_paths.models_dir = str(folder / "models")
        work(folder)
    if found:
        return 3
    print("nothing forbidden")
    return 0


if __name__ == "__main__":
    sys.exit(main())
