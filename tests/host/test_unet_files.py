"""What changes when the files of a quantized UNet are replaced."""

import json

import pytest


@pytest.fixture
def touched(tmp_path, comfy_inprocess):
    """Whether a file that is written anew changes the state of another one."""
    from quanttune.host.unet_files import quantized_unet_state

    def change(path, name):
        before = quantized_unet_state(path)
        assert before == quantized_unet_state(path)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"another one")
        return quantized_unet_state(path) != before

    return change


def test_a_file_and_the_settings_beside_it(touched, tmp_path):
    path = tmp_path / "unet" / "a.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")
    assert touched(path, "unet/a.safetensors") and touched(path, "unet/config.json")
    assert touched(path, "scheduler/scheduler_config.json")
    assert not touched(path, "unet/b.safetensors")


def test_shards(touched, tmp_path):
    one, two = (f"m-0000{n}-of-00002.safetensors" for n in (1, 2))
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": one, "b": two}}))
    (tmp_path / one).write_bytes(b"")
    assert touched(tmp_path / one, two) and touched(index, one)
    assert touched(tmp_path / one, index.name)


def test_a_state_of_tuneqdm(touched, tmp_path):
    path = tmp_path / "tuneqdm_state.pt"
    path.write_bytes(b"")
    assert touched(path, "unet/config.json") and touched(path, "unet/a.safetensors")
    assert touched(path, "scheduler/scheduler_config.json")
