"""Embeddings inside a LoRA file: every reader of networks knows them and leaves them alone."""

import logging

import pytest
import torch
from safetensors.torch import load_file

from library.inference.adapters import read_network
from library.io.bundled import bundle, bundled
from tools import check_lora, convert_lora, merge_lora, resize_lora

EMBEDDINGS = {
    "zxq": {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 48)},
    "qwy": {"string_to_param.*": torch.ones(1, 32)},
}


@pytest.fixture
def with_tokens(few, changed):
    return changed(few, bundle(EMBEDDINGS), "with_tokens")


def test_names_are_those_that_a1111_reads(with_tokens):
    tensors = load_file(with_tokens)
    assert {"bundle_emb.zxq.clip_l", "bundle_emb.zxq.clip_g", "bundle_emb.qwy.string_to_param.*"} <= set(tensors)
    found = bundled(tensors)
    assert {token: set(values) for token, values in found.items()} == {t: set(v) for t, v in EMBEDDINGS.items()}


def test_a_network_is_read_without_them(tiny, few, with_tokens):
    plain = read_network(tiny, "networks.lora", few, 1.0).state_dict()
    same = read_network(tiny, "networks.lora", with_tokens, 1.0).state_dict()
    assert plain.keys() == same.keys() and all(torch.equal(plain[name], same[name]) for name in plain)


def test_tools_leave_them_out_and_say_so(few, with_tokens, base, tmp_path, caplog):
    def both(tool, *arguments):
        outputs = []
        for number, source in enumerate((few, with_tokens)):
            out = tmp_path / f"{number}.safetensors"
            out.unlink(missing_ok=True)
            assert tool.main([text.format(source=source, out=out) for text in arguments]) == 0
            outputs.append(load_file(out))
        plain, same = outputs
        assert plain.keys() == same.keys() and all(torch.equal(plain[name], same[name]) for name in plain)

    with caplog.at_level(logging.WARNING):
        both(resize_lora, "--model", "{source}", "--save_to", "{out}", "--new_rank", "2")
        both(convert_lora, "--model", "{source}", "--save_to", "{out}", "--to", "diffusers")
        both(merge_lora, "--sd_model", str(base), "--models", "{source}", "--ratios", "1", "--save_to", "{out}")
    told = [record.getMessage() for record in caplog.records if "embeddings" in record.getMessage()]
    assert len(told) >= 3 and all(text.endswith("the embeddings in it are left out: qwy, zxq") for text in told)
    assert check_lora.main([str(with_tokens)]) == 0
