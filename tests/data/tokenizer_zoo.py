"""Small tokenizers of the kinds that are published, by name: (tokenizer, tokenizer_config.json, end of text)."""

import json
import random

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data.tokenizer import byte_tokenizer, train_bpe

WORDS = ["the", "cat", "sat", "on", "a", "mat", "under", "stars", "while", "rivers", "and", "hills", "ran", "by", "the", "sea"]
Zoo = dict[str, tuple[Tokenizer, dict | None, str]]


def corpus(count: int = 60) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 20))) + "." for _ in range(count)]


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def byte_level(added: list[str], vocab_size: int = 320) -> Tokenizer:
    """Byte-level BPE whose special tokens come after the vocabulary, as with Qwen and Llama 3."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([*corpus(), "</s> </s> <|endoftext|> <|endoftext|>"], trainer)
    tok.add_special_tokens(special(*added))
    return tok


def with_bos(tok: Tokenizer, bos: str, *before: processors.PostProcessor) -> Tokenizer:
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))]
    )
    tok.post_processor = processors.Sequence([*before, template]) if before else template
    return tok


def plain_bytes(tok: Tokenizer) -> Tokenizer:
    """Make the bytes of byte_fallback plain tokens again: the trainer can only add them as special tokens."""
    state = json.loads(tok.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(state))


def llama() -> Tokenizer:
    """BOS by post-processor, byte fallback, a dummy prefix, and no pre-tokenizer, so that a text is one word."""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False))
    return with_bos(plain_bytes(tok), "<s>")


def sentencepiece() -> Tokenizer:
    """A converted SentencePiece BPE with Metaspace, as with Gemma and Mistral."""
    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()])
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tok.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False))
    return with_bos(plain_bytes(tok), "<bos>")


def wordpiece() -> Tokenizer:
    tok = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tok.train_from_iterator(corpus(), trainers.WordPieceTrainer(vocab_size=120, special_tokens=names, show_progress=False))
    tok.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tok


def unigram() -> Tokenizer:
    """As T5: the vocabulary holds '</s>' with the best score, and the post-processor adds it."""
    tok = Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=list("</>s"),
    )
    tok.train_from_iterator([*corpus(), "< / s >"], trainer)
    tok.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tok


def plain_end() -> Tokenizer:
    """'</s>' is a plain entry that merges lead to, '<|END|>' is special."""
    tok = Tokenizer(models.BPE())
    tok.decoder = decoders.ByteLevel()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|END|>"], initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator(["a</s>b</s>", "x</s>", "</s>"] * 50, trainer)
    return tok


def zoo() -> Zoo:
    qwen = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    llama3 = byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    llama3 = with_bos(llama3, "<|begin_of_text|>", processors.ByteLevel(trim_offsets=True))
    return {
        "bytes": (byte_tokenizer(), None, "<|endoftext|>"),
        "own bpe": (train_bpe(corpus(), 300), None, "<|endoftext|>"),
        "gpt2": (byte_level(["<|endoftext|>"]), {"model_max_length": 1024}, "<|endoftext|>"),
        "llama": (llama(), None, "</s>"),
        "gemma": (sentencepiece(), None, "<eos>"),
        "bert": (wordpiece(), {"sep_token": "[SEP]", "pad_token": "[PAD]"}, "[SEP]"),
        "t5": (unigram(), {"eos_token": {"content": "</s>", "__type": "AddedToken"}}, "</s>"),
        "qwen": (qwen, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, "<|im_end|>"),
        "qwen base": (qwen, None, "<|endoftext|>"),
        "llama 3": (llama3, {"eos_token": "<|eot_id|>"}, "<|eot_id|>"),
        "llama 3 base": (llama3, None, "<|end_of_text|>"),
        "plain end": (plain_end(), None, "</s>"),
        "plain end, declared": (plain_end(), {"eos_token": "<|END|>"}, "<|END|>"),
        "candidates": (byte_level(["[SEP]", "</s>", "<eos>"]), None, "<eos>"),
    }


ZOO = zoo()
