"""Drawing from Python, as the documentation shows it."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from library.errors import UserError
from library.inference.api import DEFAULTS, draw, load
from library.inference.launch import generate
from library.sizes import Size

ROOT = Path(__file__).parents[2]


def test_the_example_of_the_documentation_draws(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(from library.inference.api.*?)```", page, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 5
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/prompts.md", "exec"), {})
    assert {Image.open(path).size for path in tmp_path.glob("*.png")} == {(128, 128)}
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_networks_images_and_defaults(lora_file, tmp_path):
    model = load("tiny", networks={str(lora_file): 0.5}, device="cpu")
    (network,) = model.networks
    assert network.multiplier == 0.5
    how = DEFAULTS.__class__(**{**vars(DEFAULTS), "steps": 2, "sampler": "euler"})
    made = list(draw(model, ["a {red} circle --am 0", "a {red} circle"], seed=3, batch_size=2, defaults=how))
    assert [request.prompt for request, _ in made] == ["a red circle"] * 2
    assert [request.network_muls for request, _ in made] == [(0.0,), None]
    request, picture = made[1]
    assert picture.size == (128, 128) and not np.array_equal(picture, made[0][1])
    (same,) = generate(model.bundle, [request], networks=model.networks)
    assert np.array_equal(same[1], picture), "it is the same call"
    over = how.__class__(**{**vars(how), "image": Image.new("RGB", (70, 200), (0, 0, 255)), "strength": 0.5})
    ((request, picture),) = draw(model, ["a circle"], seed=1, defaults=over)
    assert request.size == Size(64, 192) == Size(*picture.size)
    lines = [("a --sed 3", "prompt 2"), ("b --am 1,2", "--am has 2 strengths"), ("c --t 0.5", "--t cannot act")]
    for line, what in lines:
        with pytest.raises(UserError, match=what):
            draw(model, ["a", line])
    with pytest.raises(UserError, match="less than one step"):
        draw(model, ["a", "b --s 1"], defaults=over)
    with pytest.raises(UserError, match="pndm cannot do 3 steps"):
        draw(model, ["a", "b --s 3"], defaults=how.__class__(steps=4, sampler="pndm"))
    network.detach()


def test_files_that_are_missing_are_named():
    with pytest.raises(UserError, match="nowhere"):
        load("tiny", networks={"nowhere.safetensors": 1.0}, device="cpu")
