"""Files between this crate and Hugging Face's classes; `tests/hf_classes.rs` runs it.

    python3 tests/hf/exchange.py check          whether the library is here: status 0
    python3 tests/hf/exchange.py write DIR      models as the library saves them, each in a folder below DIR, with the
                                                tokens `ids` and their `logits`
    python3 tests/hf/exchange.py read DIR CLASS loads a model that was written here, compares its logits with those in
                                                DIR/answers.safetensors, and lets a language model write ten tokens
"""

import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

BOUND = 1e-4
SIZES = {"vocab_size": 31, "initializer_range": 0.2}


def gpt2_config():
    return transformers.GPT2Config(
        n_embd=24, n_head=3, n_layer=2, n_positions=12, bos_token_id=0, eos_token_id=0, **SIZES
    )


def bert_config():
    return transformers.BertConfig(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=2, intermediate_size=40,
        max_position_embeddings=12, num_labels=3, **SIZES
    )


def save(folder, model, logits, dtype=torch.float32, **how):
    """The answers are those of the rounded weights, in f32. Logits that a head of the file does not give: none."""
    model.eval().to(dtype).save_pretrained(folder, **how)
    ids = torch.arange(1, 19).reshape(2, 9)
    answers = {"ids": ids}
    if logits is not None:
        with torch.no_grad():
            answers["logits"] = logits(model.float(), ids).contiguous()
    save_file(answers, folder / "answers.safetensors")


def write(root):
    torch.manual_seed(1)
    own = lambda model, ids: model(ids).logits
    tied = lambda model, ids: model(ids).last_hidden_state @ model.wte.weight.T
    predictions = lambda model, ids: model(ids).prediction_logits
    choices = lambda model, ids: model(ids[:, None], mc_token_ids=torch.full((2, 1), 8)).logits[:, 0]
    body = lambda model, ids: model.transformer(ids).last_hidden_state @ model.transformer.wte.weight.T
    for name, logits in [
        ("GPT2LMHeadModel", own), ("GPT2Model", tied), ("GPT2DoubleHeadsModel", choices),
        ("GPT2ForSequenceClassification", body), ("BertForMaskedLM", own), ("BertForPreTraining", predictions),
        ("BertForSequenceClassification", own), ("BertModel", None), ("BertForTokenClassification", None),
    ]:
        make = lambda: getattr(transformers, name)(gpt2_config() if name.startswith("GPT2") else bert_config())
        for dtype in torch.float32, torch.float16, torch.bfloat16:
            save(root / f"{name}-{str(dtype).removeprefix('torch.')}", make(), logits, dtype)
        save(root / f"{name}-shards", make(), logits, max_shard_size="8KB")
        assert (root / f"{name}-shards" / "model.safetensors.index.json").exists()


def read(folder, name):
    config = json.loads((folder / "config.json").read_text())
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    found = {key: value for key, value in info.items() if value}
    assert not found, f"{name}: {found}"
    answers = load_file(folder / "answers.safetensors")
    ids, ours = answers["ids"], answers["logits"]
    with torch.no_grad():
        theirs = model.eval()(ids).logits
    assert ours.shape == theirs.shape, f"{name}: {ours.shape}, {theirs.shape}"
    distance = (ours - theirs).norm() / theirs.norm()
    assert distance <= BOUND, f"{name}: logits differ by {distance}"
    if name == "GPT2LMHeadModel":
        written = model.generate(ids[:1, :4], max_new_tokens=10, do_sample=False)
        assert written.shape == (1, 14), f"{name}: {written}"
        assert written.max() < config["vocab_size"]


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    match what:
        case "write":
            write(pathlib.Path(rest[0]))
        case "read":
            read(pathlib.Path(rest[0]), rest[1])
