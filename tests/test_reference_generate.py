"""Greedy answers of the reference folders, made by transformers' generate on the same tiny random models."""

from types import SimpleNamespace

from test_reference import folders, golden

from data.labels import NO_LOSS
from eval.generate import generate
from model import load_model


@folders("qwen2")
def test_greedy_ids(folder):
    _, facts = golden(folder)
    facts = facts["greedy"]
    model, family = load_model(folder, dtype="float32")
    family.tokenizer = SimpleNamespace(decode=lambda ids, **settings: "")  # the folder has none
    prompts = [family.example(ids, [NO_LOSS] * len(ids)) for ids in facts["prompts"]]
    num_tokens = max(map(len, facts["new_tokens"]))
    assert [a.ids for a in generate(model, prompts, num_tokens, stop_ids=[])] == facts["new_tokens"]
