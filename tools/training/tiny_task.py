"""The task of weights/tiny: word problems with running totals, as transcripts of teams.

    Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?

The reasoning of every agent is the list of running totals, ` 2 9 6`. Each total is one token, so
that one latent step can do one step of the reasoning. A transcript is the text that a team would
have generated. Neither this module nor training computes latent steps. This module does not use
models.
"""

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LARGEST_TOTAL = 15  # totals stay in 0 … 15
MAX_OPERATIONS = 6  # per question
MAX_SPLIT_OPERATIONS = 3  # in each of the three stories of a split question
NAMES = (
    ("Tom", "He"),
    ("Ann", "She"),
    ("Ben", "He"),
    ("Eva", "She"),
    ("Sam", "He"),
    ("Mia", "She"),
)
THINGS = ("apples", "pears", "plums", "coins", "books", "cards")
GAINS = ("gets", "finds", "buys")
LOSSES = ("loses", "sells", "eats")

# The user message of each agent. teams.json has the same prompts for users of the checkpoint.
PROMPTS = {
    "solver": "Solve it step by step. {question}",
    "planner": "Planner: work it out. {question}",
    "critic": "Critic: check the work. {question}",
    "refiner": "Refiner: write it again. {question}",
    "judger": "Judger: give the answer. {question}",
    "math": "Math expert: work it out. {question}",
    "science": "Science expert: work it out. {question}",
    "code": "Code expert: work it out. {question}",
    "summarizer": "Summarizer: give the answer. {question}",
}
CHAIN = ("planner", "critic", "refiner")
EXPERTS = ("math", "science", "code")
NO_QUESTION = "How many?"  # for a judger that has the question only in its KV cache

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
END = "<|im_end|>\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LATENT_STEPS = 6  # five operations have six totals

PROMPT_WEIGHT = 0.1  # loss weight of prompt tokens: enough to learn the form of a turn


# -- questions -------------------------------------------------------------------------------------


class Story(NamedTuple):
    """A story about one person and how many things they have.

    `totals` has one number per sentence. The last one is the answer.
    """

    name: str
    thing: str
    text: str
    totals: tuple[int, ...]

    @property
    def question(self) -> str:
        """Return the story and the question about it."""
        return f"{self.text} {self.ask}"

    @property
    def ask(self) -> str:
        """Return the question without the story."""
        return f"How many {self.thing} does {self.name} have?"


def story(
    rng: random.Random,
    operations: int,
    who: tuple[str, str] | None = None,
    thing: str | None = None,
    fresh: bool = False,
) -> Story:
    """Draw a story that has `operations` sentences after the first one.

    It is about `who` (name, pronoun) and `thing`, which are drawn as well if they are None. One
    text in eight, chosen by its checksum, is held out from training. `fresh` draws only these
    texts.
    """
    while True:
        told = _story(rng, operations, who or rng.choice(NAMES), thing or rng.choice(THINGS))
        if (zlib.crc32(told.text.encode()) % 8 == 0) == fresh:
            return told


def _story(rng: random.Random, operations: int, who: tuple[str, str], thing: str) -> Story:
    name, pronoun = who
    totals = [rng.randint(2, 8)]
    sentences = [f"{name} has {totals[0]} {thing}."]
    for _ in range(operations):
        phrase, total = _operation(rng, totals[-1], thing)
        sentences.append(f"{pronoun} {phrase}.")
        totals.append(total)
    return Story(name, thing, " ".join(sentences), tuple(totals))


def _operation(rng: random.Random, total: int, thing: str) -> tuple[str, int]:
    """Draw an operation that keeps the total in range. Returns its phrase and the new total.

    About a third of the operations double or halve the total.
    """
    while True:
        scale, up, n = rng.random() < 0.35, rng.random() < 0.5, rng.randint(1, 7)
        if scale and up and 0 < total <= LARGEST_TOTAL // 2:
            return f"doubles the {thing}", total * 2
        if scale and not up and total > 1 and total % 2 == 0:
            return "gives away half", total // 2
        if not scale and up and total + n <= LARGEST_TOTAL:
            return f"{rng.choice(GAINS)} {n} more", total + n
        if not scale and not up and total - n >= 0:
            return f"{rng.choice(LOSSES)} {n}", total - n


def split_stories(
    rng: random.Random, shortest: int = 1, longest: int = MAX_SPLIT_OPERATIONS, fresh: bool = False
) -> tuple[list[Story], Story]:
    """Draw three stories about three people and one thing, and choose one to ask about."""
    thing = rng.choice(THINGS)
    stories = [
        story(rng, rng.randint(shortest, longest), who, thing, fresh)
        for who in rng.sample(NAMES, 3)
    ]
    return stories, rng.choice(stories)


def numbers(totals: Sequence[int]) -> str:
    """Return running totals as text. Each total with the space before it is one token."""
    return "".join(f" {total}" for total in totals)


# -- tokens ----------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer on texts of the task.

    It can encode any text, and every total is one token.
    """
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["system\n", "user\n", "assistant\n"] * 100
    for _ in range(2000):
        told = story(rng, MAX_OPERATIONS)
        corpus += [told.question, numbers(range(LARGEST_TOTAL + 1)), NO_QUESTION, f" {told.name}"]
        corpus += [prompt.format(question=told.question) for prompt in PROMPTS.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=2,
        special_tokens=[
            AddedToken(text, special=True, normalized=False) for text in CONTROL + THINK
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # As in Qwen3, these tokens are not control tokens. They stay in the decoded text, so that a
    # grader sees where the thinking ends.
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINK])
    return tokenizer


def write_text_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the JSON files of the model's folder: tokenizer, chat template, sampling, teams."""
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    added = {
        tokenizer.token_to_id(text): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": text in CONTROL,
        }
        for text in CONTROL + THINK
    }
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, Any] = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": added,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 16384,
            "chat_template": CHAT_TEMPLATE,
        },
        "generation_config.json": {
            "do_sample": False,
            "eos_token_id": ends,
            "pad_token_id": ends[1],
        },
        "teams.json": {
            "single": team("solver"),
            "sequential": team(*CHAIN, "judger"),
            "hierarchical": team(*EXPERTS, "summarizer", parallel=True),
            "latent_steps": LATENT_STEPS,
        },
        "split.json": split_team([told.text for told in split_example()[0]]),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def team(*names: str, parallel: bool = False) -> dict[str, Any]:
    """Return a team in the format of teams.json."""
    agents = [{"name": name, "prompt": PROMPTS[name]} for name in names]
    return {"parallel": parallel, "layout": "chat", "agents": agents}


def split_team(texts: Sequence[str]) -> dict[str, Any]:
    """Return a team whose experts have one text each. Only the summarizer has the question."""
    members = team(*EXPERTS, "summarizer", parallel=True)
    for agent, text in zip(members["agents"], texts, strict=False):
        agent["prompt"] = agent["prompt"].format(question=text)
    return members


def split_example() -> tuple[list[Story], Story]:
    """Return the three stories of split.json, and the one to ask about."""
    return split_stories(random.Random(0), fresh=True)


# -- transcripts -----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Token ids, and the loss weight of each token."""

    ids: list[int]
    weights: list[float]

    def __add__(self, other: Any) -> "Piece":
        """Return this piece followed by another."""
        return Piece(self.ids + other.ids, self.weights + other.weights)


class Transcript(NamedTuple):
    """The turns of a team.

    Each of `experts` starts from an empty KV cache. `tail` follows the joined caches of the
    experts.
    """

    experts: list[Piece]
    tail: Piece


class Teller:
    """Draws random transcripts."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.rng = rng
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def draw(self, kinds: dict[str, float], longest: int) -> Transcript:
        """Draw a transcript with at most `longest` operations.

        `kinds` has the probabilities of "single", "chain", "direct", "experts" and "split", up to a
        common factor.
        """
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        told = story(self.rng, self.rng.randint(1, longest))
        if kind == "single":
            answer = f"<think>{numbers(told.totals)}</think> {told.totals[-1]}"
            return Transcript([], self._turn("solver", told.question, answer))
        if kind == "chain":
            return self._chain(told)
        if kind == "direct":  # trains a judger without a KV cache too, for a fair baseline
            role = self.rng.choice(("judger", "judger", "summarizer"))
            return Transcript([], self._turn(role, told.question, f" {told.totals[-1]}"))
        if kind == "experts":
            asked = [(told.question, f" {told.totals[-1]}")]
            return self._experts([told.question] * 3, [numbers(told.totals)] * 3, asked)
        return self._split(min(MAX_SPLIT_OPERATIONS, longest - 1))

    def _split(self, longest: int) -> Transcript:
        """Draw three experts with one story each.

        The text of an expert ends with the name and the total, and the summarizer's answer has the
        name too. The summarizer is asked about all three stories in random order, because with one
        question per transcript the model learns retrieval too slowly.
        """
        stories, _ = split_stories(self.rng, 0, longest)
        texts = [told.text for told in stories]
        answers = [f"{numbers(told.totals)} {told.name} {told.totals[-1]}" for told in stories]
        in_any_order = self.rng.sample(stories, 3)
        asked = [(told.ask, f" {told.name} {told.totals[-1]}") for told in in_any_order]
        return self._experts(texts, answers, asked)

    def _chain(self, told: Story) -> Transcript:
        """Draw one to three agents that work one after another, then the judger."""
        count = self.rng.choices((1, 2, 3), (0.5, 0.2, 0.3))[0]
        roles = sorted(self.rng.sample(CHAIN, count), key=CHAIN.index)
        cut = self._cut()
        tail = Piece([], [])
        for role in roles:
            if cut is None and role != roles[-1] and self.rng.random() < 0.15:
                tail += self._mistaken_turn(role, told)  # a later agent corrects it
            else:
                tail += self._turn(role, told.question, numbers(told.totals), cut)
        asked = NO_QUESTION if self.rng.random() < 0.25 else told.question
        return Transcript([], tail + self._turn("judger", asked, f" {told.totals[-1]}"))

    def _experts(
        self, questions: list[str], answers: list[str], asked: list[tuple[str, str]]
    ) -> Transcript:
        """Return three experts, and the summarizer's answers to one or more questions."""
        cut = self._cut()
        texts = zip(EXPERTS, questions, answers, strict=True)
        turns = [self._turn(role, question, answer, cut) for role, question, answer in texts]
        tail = Piece([], [])
        for question, answer in asked:
            tail += self._turn("summarizer", question, answer)
        if self.rng.random() < 0.25:  # as in text_mas, the three turns form one sequence
            return Transcript([], turns[0] + turns[1] + turns[2] + tail)
        return Transcript(turns, tail)

    def _cut(self) -> int | None:
        """Draw the number of tokens after which turns end, or None: they end after the answer."""
        return self.rng.randint(0, 8) if self.rng.random() < 0.4 else None

    def _turn(self, role: str, question: str, answer: str, cut: int | None = None) -> Piece:
        message = PROMPTS[role].format(question=question)
        prompt = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        before, said, end = self._encode(prompt), self._encode(answer), self._encode(END)
        weights = [1.0] * (len(said) + 1) + [PROMPT_WEIGHT]
        if cut is None:
            return Piece(before + said + end, [PROMPT_WEIGHT] * len(before) + weights)
        # The turn has a fixed number of tokens, as a latent rollout has a fixed number of steps. If
        # it is too small, the turn ends early, and the loss does not count that end. If it is too
        # large, the agent continues with the text that follows a turn, and then ends the turn
        # again.
        run = said + end + self._encode("<|im_start|>user\n")
        weights += [PROMPT_WEIGHT] * 3
        closing = [1.0 if cut == len(said) else 0.0, PROMPT_WEIGHT]
        return Piece(
            before + run[:cut] + end,
            [PROMPT_WEIGHT] * len(before) + weights[: len(run[:cut])] + closing,
        )

    def _mistaken_turn(self, role: str, told: Story) -> Piece:
        """Return a turn with an error that shifts all later totals.

        The loss counts only the right totals.
        """
        slip = self.rng.randrange(1, len(told.totals))
        wrong = self.rng.choice([n for n in range(LARGEST_TOTAL + 1) if n != told.totals[slip]])
        shift = wrong - told.totals[slip]
        shifted = [max(0, min(LARGEST_TOTAL, n + shift)) for n in told.totals[slip:]]
        turn = self._turn(role, told.question, numbers([*told.totals[:slip], *shifted]))
        end = len(turn.ids) - len(self._encode(END))
        turn.weights[end - len(shifted) : end] = [0.0] * len(shifted)
        return turn

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]
