"""Single nodes in process: run as the executor runs them, with folders of the test's own."""

import pytest

from quanttune.tests.harness.inprocess import pack_nodes, run_node


def a_node():
    import torch
    from comfy_api.latest import io

    class Multiply(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id="Multiply",
                category="test",
                inputs=[
                    io.Int.Input("x"),
                    io.Int.Input("y", default=3),
                    io.Combo.Input("how", options=["plain", "fancy"]),
                    io.Int.Input("z", default=9, optional=True),
                ],
                outputs=[io.Int.Output()],
            )

        @classmethod
        def execute(cls, x, y, how, z=1):
            assert torch.is_inference_mode_enabled() and how == "plain"
            return io.NodeOutput(x * y * z)

    return Multiply


def test_a_node_runs_with_its_defaults(comfy_inprocess):
    assert run_node(a_node(), x=2).args == (6,)
    assert run_node(a_node(), x=2, y=5, z=2).args == (20,)
    with pytest.raises(TypeError, match="Multiply has no input w"):
        run_node(a_node(), x=1, w=2)


def test_the_hosts_folders_are_the_tests_own(comfy_inprocess, host_folders):
    import folder_paths

    (host_folders / "models" / "diffusion_models" / "mine.safetensors").touch()
    assert folder_paths.get_filename_list("diffusion_models") == ["mine.safetensors"]
    assert folder_paths.get_output_directory() == str(host_folders / "output")
    assert folder_paths.get_filename_list("loras") == []


def test_the_packs_nodes_are_found_by_id(comfy_inprocess, host_folders):
    nodes = pack_nodes()
    assert nodes and all(name.startswith("QuantTune") for name in nodes)
