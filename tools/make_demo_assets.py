"""Build the model and the text that `--model demo` and `fastcache demo` use, from nothing but Python itself.

    python tools/make_demo_assets.py --out fastcache/assets/demo

Makes a pretraining-like corpus and a chat corpus (see stdlib_text.py), a byte-level BPE tokenizer with ChatML
special tokens, and a small Qwen2-architecture chat model: trained on the text first, then fine-tuned on the
dialogues, each on its own. Writes a model card with what was measured.
"""

import argparse
import gzip
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from stdlib_text import chat_dialogues, library_entries, pretraining_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CONTEXT = 512
VOCABULARY = 4096
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CARD = """# The fastcache demo model

A {parameters:,}-parameter chat model with the Qwen2 architecture (d_in {d_in}, {layers} layers, vocabulary {vocabulary},
context {context}), made only so that every fastcache command and example runs offline in seconds. **It knows almost
nothing**: it answers in the chat format, with text that looks like Python documentation. Findings made on it say
nothing about real language models.

- **Data**: {n_documents} documents ({document_chars:,} characters: language reference, docstrings, code) and
  {n_dialogues} dialogues ({dialogue_chars:,} characters: questions about documented objects, answers from their
  docstrings, follow-ups; about 8 % of the objects are asked about twice, as near-duplicates for deduplication to
  find), all generated from the standard library of CPython {python}. E-mail addresses are removed.
- **Licence**: the text is from CPython, Python Software Foundation License 2 (see LICENSE-PSF.txt beside this file);
  tokenizer and weights are Apache-2.0 as the rest of fastcache.
- **Training**: {steps} steps on documents, then {steps} on dialogues, one dialogue a sequence,
  batches of about {batch_tokens} tokens, AdamW, cosine learning rate, seed 42, float32, stored as bfloat16.
- **Held-out loss** (nats per token, 2 % of each corpus): documents {document_loss:.3f} after the first phase;
  dialogues {dialogue_loss_before:.3f} before and {dialogue_loss:.3f} after fine-tuning.
  (A uniform guess is {uniform:.3f}.)
- **Rebuild**: `python tools/make_demo_assets.py --out fastcache/assets/demo`
"""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML special tokens; the role words are whole tokens because the dialogues are rendered."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def render(dialogue: dict) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in dialogue["messages"])


def document_blocks(ids: list[list[int]], separator: int) -> torch.Tensor:
    flat = [token for document in ids for token in [*document, separator]]
    n_blocks = len(flat) // CONTEXT
    return torch.tensor(flat[: n_blocks * CONTEXT]).view(n_blocks, CONTEXT)


def document_batches(blocks: torch.Tensor, n_blocks: int) -> Iterator[torch.Tensor]:
    while True:
        for rows in torch.randperm(len(blocks)).split(n_blocks):
            yield blocks[rows]


def dialogue_batches(ids: list[list[int]], batch_tokens: int) -> Iterator[torch.Tensor]:
    """Right-padded batches of dialogues of similar length; the padding id is -100."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and len(ids[i]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    while True:
        random.shuffle(batches)
        for batch in batches:
            rows = [torch.tensor(ids[i]) for i in batch]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def mean_loss(model: Qwen2ForCausalLM, sequences: list[list[int]]) -> float:
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids in sequences:
            row = torch.tensor([ids[:CONTEXT]])
            if row.shape[1] > 1:
                total += float(model(input_ids=row, labels=row).loss) * (row.shape[1] - 1)
                count += row.shape[1] - 1
    return total / count


def train(model: Qwen2ForCausalLM, batches: Iterator[torch.Tensor], steps: int, rate: float, note: Callable) -> None:
    """AdamW for `steps` batches, the learning rate along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    start = time.monotonic()
    model.train()
    for step in range(steps):
        labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        # Right padding and causal attention: real tokens never see the padding, so no mask is needed.
        loss = model(input_ids=labels.clamp(min=0), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            note(f"step {step}/{steps} loss {float(loss):.3f} ({time.monotonic() - start:.0f} s)")
    model.eval()


def write_jsonl(path: Path, rows: list[dict]) -> None:
    with path.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000, help="of each phase")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    arguments = parser.parse_args()
    random.seed(42)
    torch.manual_seed(42)

    entries = library_entries()
    documents, dialogues = pretraining_documents(entries, 4_000_000), chat_dialogues(entries)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "pretrain.jsonl.gz", documents)
    write_jsonl(out / "chat.jsonl.gz", dialogues)

    chat_texts = [render(dialogue) for dialogue in dialogues]
    # Rendered headers are frequent, so `user`, `assistant` and `system` become single tokens.
    training_text = [document["text"] for document in documents] + chat_texts
    tokenizer = train_tokenizer(training_text)
    for word in ("user", "assistant", "system"):
        assert len(tokenizer.encode(word)) == 1, word
    tokenizer.save_pretrained(out)
    document_ids = tokenizer([document["text"] for document in documents])["input_ids"]
    chat_ids = [ids[:CONTEXT] for ids in tokenizer(chat_texts)["input_ids"]]
    held_documents, held_chats = document_ids[: len(document_ids) // 50], chat_ids[: len(chat_ids) // 50]
    print(f"{sum(map(len, document_ids)):,} document tokens, {sum(map(len, chat_ids)):,} dialogue tokens")

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=160, intermediate_size=480, num_hidden_layers=6,
            num_attention_heads=2, num_key_value_heads=1, head_dim=64, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, rope_theta=10000.0, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    note = lambda text: print(text, flush=True)  # noqa: E731
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    blocks = document_blocks(document_ids[len(held_documents) :], separator)
    batches = document_batches(blocks, arguments.batch_tokens // CONTEXT)
    train(model, batches, arguments.steps, 3e-3, note)
    document_loss, before = mean_loss(model, held_documents), mean_loss(model, held_chats)
    batches = dialogue_batches(chat_ids[len(held_chats) :], arguments.batch_tokens)
    train(model, batches, arguments.steps, 1.5e-3, note)

    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(out)
    after = mean_loss(model.float(), held_chats)
    card = CARD.format(
        parameters=model.num_parameters(), d_in=model.config.hidden_size, layers=model.config.num_hidden_layers,
        vocabulary=len(tokenizer), context=CONTEXT, n_documents=len(documents), n_dialogues=len(dialogues),
        document_chars=sum(len(d["text"]) for d in documents),
        dialogue_chars=sum(len(m["content"]) for d in dialogues for m in d["messages"]),
        python=platform.python_version(), steps=arguments.steps,
        batch_tokens=arguments.batch_tokens,
        document_loss=document_loss, dialogue_loss_before=before, dialogue_loss=after, uniform=math.log(len(tokenizer)),
    )  # fmt: skip
    (out / "README.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
