"""A CLIP tokenizer whose byte-pair merges are learnt from the captions."""

from pathlib import Path

__all__ = ["MAX_TOKENS", "load_tokenizer", "train_tokenizer"]

MAX_TOKENS = 16
"""Length every prompt is padded to, start and end tokens included."""

_START, _END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(texts: list[str], folder: Path, vocabulary_size: int = 2600) -> None:
    """Learn the merges from `texts` and write a folder that `CLIPTokenizer.from_pretrained` reads."""
    import json

    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    backend = CLIPTokenizer().backend_tokenizer  # brings CLIP's own normaliser and word splitting
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    backend.train_from_iterator(texts, trainer)
    model = json.loads(backend.to_str())["model"]
    # Like CLIP: every byte alone, every byte as a word's end, then the merges, then start and end.
    tokens = dict.fromkeys(alphabet + [byte + "</w>" for byte in alphabet])
    merges = [tuple(pair) for pair in model["merges"]]
    tokens.update(dict.fromkeys("".join(pair) for pair in merges))
    vocabulary = {token: index for index, token in enumerate([*tokens, _START, _END])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: Path):
    """The tokenizer that `train_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
