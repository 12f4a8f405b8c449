"""The paper's tables come out of our own code exactly."""

import json

import pytest

from quanttune.benchmarks import sizes


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    pytest.importorskip("comfy.options", reason="needs the host")
    path = tmp_path_factory.mktemp("sizes") / "out.json"
    assert sizes.main(["--json", str(path)]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("params", 859_520_964),
        ("layers", 282),
        ("split_layers", 12),
        ("peqa_params", 328_964),
        ("tuneqdm_params", 623_304),
    ],
)
def test_sd15_counts(numbers, key, expected):
    assert numbers["sd15"][key] == expected


@pytest.mark.parametrize(
    ("key", "expected", "digits"),
    [
        ("gib_32", 3.202, 3),
        ("gib_8", 0.8005, 4),
        ("gib_4", 0.4002, 4),
        ("peqa_mb", 1.316, 3),
        ("tuneqdm_mb", 2.493, 3),
    ],
)
def test_sd15_sizes(numbers, key, expected, digits):
    assert round(numbers["sd15"][key], digits) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("params", 35_746_307),
        ("layers", 113),
        ("peqa_params", 29_315),
        ("tuneqdm_params_2_experts", 133_900),
        ("qlora_params_rank_32", 8_640_835),
        ("qlora_params_rank_2", 567_535),
    ],
)
def test_cifar_counts(numbers, key, expected):
    assert numbers["cifar"][key] == expected


def test_files_are_hardly_larger_than_their_scales(numbers):
    sd15 = numbers["sd15"]
    for kind in ("peqa", "tuneqdm"):
        assert 1 < sd15[f"{kind}_file_bytes"] / (sd15[f"{kind}_mb"] * 1e6) < 1.03


def test_numbers_are_found_by_dotted_name_and_by_group(numbers):
    for group in ("sd15", "cifar"):
        for key, value in numbers[group].items():
            assert numbers[f"{group}.{key}"] == value
