"""Token ids of answers under the conventions of the usual families of tokenizers."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.fact_tokens import answer_ids, joined, prompt_ids
from gravity_hf.knowledge.facts import BANKS, Fact, load_facts

SPECIAL = ["<unk>", "<s>", "</s>"]
CAPITAL = "The capital of {} is"
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def texts() -> list[str]:
    return [joined(x.prompt, x.answer) for name in BANKS for x in load_facts(name)[::3]]


def trained(tokenizer: Tokenizer, alphabet: Iterable[str], lines: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def around(pattern: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(pattern, special_tokens=[("<s>", 1), ("</s>", 2)])


def gpt2(lines: list[str]) -> PreTrainedTokenizerFast:
    """Bytes; a space belongs to the word after it; nothing is added."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return wrapped(trained(bpe, pre_tokenizers.ByteLevel.alphabet(), lines))


def llama(lines: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece: a sign for the space, put before the first word too; BOS before the text."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    letters = set("".join(lines)) - {" "} | {"▁"} | set("0123456789")
    bpe = trained(bpe, letters, lines)
    bpe.post_processor = around("<s> $A")
    return wrapped(bpe)


def qwen(lines: list[str]) -> PreTrainedTokenizerFast:
    """Bytes, words and single digits apart, NFC; nothing is added."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return wrapped(trained(bpe, pre_tokenizers.ByteLevel.alphabet(), lines))


def enclosed(lines: list[str]) -> PreTrainedTokenizerFast:
    """BOS before and EOS after every text."""
    tokenizer = gpt2(lines)
    tokenizer._tokenizer.post_processor = around("<s> $A </s>")
    return tokenizer


FAMILIES = {"gpt2": gpt2, "llama": llama, "qwen": qwen, "enclosed": enclosed}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return texts()


@pytest.fixture(scope="module", params=FAMILIES)
def tokenizer(request: pytest.FixtureRequest, lines: list[str]) -> PreTrainedTokenizerFast:
    return FAMILIES[request.param](lines)


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return [x for name in BANKS for x in load_facts(name)[::4]]


def test_prompt_and_answer_are_the_text_and_the_answer_is_spelled(
    tokenizer: PreTrainedTokenizerFast, facts: list[Fact]
) -> None:
    for fact in facts:
        ids = answer_ids(tokenizer, fact.prompt, fact.answer)
        whole = [x for x in tokenizer(joined(fact.prompt, fact.answer))["input_ids"] if x != 2]
        assert prompt_ids(tokenizer, fact.prompt) + ids == whole
        assert tokenizer.decode(ids).strip() == fact.answer
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_bos_is_read_before_the_prompt_and_never_answered(lines: list[str]) -> None:
    """The first id of an answer tokenised by itself is BOS, for every answer alike."""
    for tokenizer in (llama(lines), enclosed(lines)):
        capitals = {"France": "Paris", "Norway": "Oslo", "Peru": "Lima"}
        alone = {tokenizer.encode(f" {x}")[0] for x in capitals.values()}
        assert alone == {tokenizer.bos_token_id}
        firsts = {answer_ids(tokenizer, CAPITAL.format(s), a)[0] for s, a in capitals.items()}
        assert len(firsts) == 3
        assert prompt_ids(tokenizer, CAPITAL.format("Peru"))[0] == tokenizer.bos_token_id


def test_nothing_is_read_after_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.eos_token_id not in prompt_ids(tokenizer, "The capital of Peru is")


def test_the_space_belongs_to_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    with_space, without = "The capital of Peru is  ", "The capital of Peru is"
    assert prompt_ids(tokenizer, with_space) == prompt_ids(tokenizer, without)
    assert answer_ids(tokenizer, "The capital of Peru is ", "Lima") == answer_ids(
        tokenizer, without, "Lima"
    )


def test_an_answer_may_stand_on_a_line_of_its_own() -> None:
    assert joined("Answer:\n", "Lima") == "Answer:\nLima"
    assert joined("Answer:", "Lima") == "Answer: Lima"


def test_a_letter_the_tokenizer_does_not_know_is_refused(lines: list[str]) -> None:
    assert answer_ids(llama(lines), "The capital of Peru is", "Lima")
    with pytest.raises(ValidationError, match=r"tokens that spell it.*reword"):
        answer_ids(llama(lines), "The capital of China is", "北京")


def test_a_special_token_as_an_answer_is_refused(lines: list[str]) -> None:
    with pytest.raises(ValidationError, match="tokens that spell it"):
        answer_ids(gpt2(lines), "The text begins with", "<s>")


def test_tokens_across_the_end_of_a_prompt_are_refused() -> None:
    bpe = Tokenizer(models.BPE())
    trained(bpe, set("The capital is Lima"), ["is Lima"] * 50)
    tokenizer = wrapped(bpe)
    assert len(tokenizer("is Lima")["input_ids"]) == 1
    with pytest.raises(ValidationError, match="end of the prompt"):
        answer_ids(tokenizer, "The capital is", "Lima")


def test_a_prompt_without_tokens_is_refused(lines: list[str]) -> None:
    with pytest.raises(ValidationError, match="text that has tokens"):
        prompt_ids(gpt2(lines), "  ")
