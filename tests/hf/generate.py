"""Makes the two small folders of odd sizes beside this file: what the other four leave out.

    pip install torch==2.11.0 transformers safetensors
    python3 tests/hf/generate.py

`bert-odd`: padding before, between and behind tokens, and the padding token (whose entry of the table is not trained as
an input) as a token that is read. `gpt2-odd`: sizes that are no multiples of 8, an inner width, other activations.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2DoubleHeadsModel

HERE = pathlib.Path(__file__).parent


def write(name, config, model, inputs, outputs):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    outputs["loss"].backward()
    answers = {f"input.{key}": value for key, value in inputs.items()}
    answers["loss"] = outputs.pop("loss").detach().reshape(1)
    for key, value in outputs.items():
        answers[f"output.{key}"] = value.detach().reshape(value.shape or 1)
    for key, parameter in model.named_parameters():
        answers[f"grad.{key}"] = parameter.grad
    copies = lambda tensors: {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(copies(answers), folder / "expected.safetensors")
    save_file(copies(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str) + "\n")


def disturbed(model):
    """Biases and norms of a new model are zeros and ones, which hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.train()


def bert():
    config = BertConfig(
        vocab_size=19, hidden_size=20, num_attention_heads=5, num_hidden_layers=1, intermediate_size=27,
        hidden_act="gelu_new", max_position_embeddings=11, type_vocab_size=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"
    model = disturbed(BertForMaskedLM(config))
    shape = (3, 9)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, :3], mask[1, 4], mask[2, 6:] = 0, 0, 0
    ids = torch.randint(0, 19, shape)
    ids[:, 5] = 0
    labels = torch.where(torch.rand(shape) < 0.5, torch.randint(0, 19, shape), torch.tensor(-100))
    labels[0, 5] = 0
    inputs = {
        "input_ids": ids, "attention_mask": mask, "labels": labels,
        "token_type_ids": torch.randint(0, 3, shape),
    }
    answer = model(**inputs)
    write("bert-odd", config, model, inputs, {"loss": answer.loss, "logits": answer.logits})


def gpt2():
    config = GPT2Config(
        vocab_size=23, n_embd=18, n_head=3, n_layer=2, n_positions=10, n_inner=31, activation_function="silu",
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, summary_first_dropout=0.0, num_labels=1,
        bos_token_id=0, eos_token_id=0,
    )
    model = disturbed(GPT2DoubleHeadsModel(config))
    ids = torch.randint(0, 23, (2, 3, 7))
    inputs = {
        "input_ids": ids,
        "mc_token_ids": torch.randint(0, 7, (2, 3)),
        "mc_labels": torch.tensor([2, 0]),
    }
    answer = model(**inputs, labels=ids)
    outputs = {
        "loss": answer.loss + answer.mc_loss, "lm_loss": answer.loss, "mc_loss": answer.mc_loss,
        "logits": answer.logits, "mc_logits": answer.mc_logits,
    }
    write("gpt2-odd", config, model, inputs, outputs)


torch.manual_seed(1)
bert()
gpt2()
