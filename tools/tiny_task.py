"""What weights/tiny is taught: word problems with running totals, told as the transcripts of teams.

    Eva has 2 cards. She finds 7 more. She loses 3. How many cards does Eva have?

Every agent's reasoning is the running totals, ` 2 9 6`, one token each, so that one latent thought can carry one step.
A transcript is what a team would have *written*; nothing here, and nothing in training, rolls out a latent thought.

Does not know: models, training, measuring.
"""

import json
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

LARGEST = 15  # totals stay in 0 … 15
LONGEST, SPLIT_LONGEST = (
    6,
    3,
)  # operations in the longest question, and in the longest story of a split one
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

# name -> its turn; `{question}` is the question. These are the contract with whoever uses the checkpoint (teams.json).
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
NO_QUESTION = "How many?"  # what a judger is asked when only the memory has the question

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
END = "<|im_end|>\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LATENT_STEPS = 6  # five operations have six totals

PROMPT_WEIGHT = 0.1  # of a prompt's tokens in the loss: enough to learn what a turn looks like


# -- questions ---------------------------------------------------------------------------------------------------------


class Story(NamedTuple):
    """Someone's belongings after each sentence: `totals` starts with what they have and ends with the answer."""

    name: str
    thing: str
    text: str
    totals: tuple[int, ...]

    @property
    def question(self) -> str:
        return f"{self.text} {self.ask}"

    @property
    def ask(self) -> str:
        return f"How many {self.thing} does {self.name} have?"


def story(
    rng: random.Random,
    operations: int,
    who: tuple[str, str] | None = None,
    thing: str | None = None,
    fresh: bool = False,
) -> Story:
    """A story of `operations` sentences after the first, about `who` (name, pronoun) and `thing`, else drawn.

    One text in eight is kept out of the training, by its checksum; `fresh` draws only from those.
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
    """A phrase that keeps the total in range, and the new total: a third are doublings and halvings."""
    while True:
        scale, up, n = rng.random() < 0.35, rng.random() < 0.5, rng.randint(1, 7)
        if scale and up and 0 < total <= LARGEST // 2:
            return f"doubles the {thing}", total * 2
        if scale and not up and total > 1 and total % 2 == 0:
            return "gives away half", total // 2
        if not scale and up and total + n <= LARGEST:
            return f"{rng.choice(GAINS)} {n} more", total + n
        if not scale and not up and total - n >= 0:
            return f"{rng.choice(LOSSES)} {n}", total - n


def split_stories(
    rng: random.Random, shortest: int = 1, longest: int = SPLIT_LONGEST, fresh: bool = False
) -> tuple[list[Story], Story]:
    """Three stories about three people and one thing, and the one of them that the summarizer is asked about."""
    thing = rng.choice(THINGS)
    stories = [
        story(rng, rng.randint(shortest, longest), who, thing, fresh)
        for who in rng.sample(NAMES, 3)
    ]
    return stories, rng.choice(stories)


def numbers(totals: Sequence[int]) -> str:
    """Running totals as written: one token each, with its space."""
    return "".join(f" {total}" for total in totals)


# -- tokens ------------------------------------------------------------------------------------------------------------


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE of the grammar's words: any text encodes, and every total is one token."""
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
        told = story(rng, LONGEST)
        corpus += [told.question, numbers(range(LARGEST + 1)), NO_QUESTION, f" {told.name}"]
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
    # As in Qwen3: text, not control, so that they survive decoding and a grader can see where the thinking ends.
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINK])
    return tokenizer


def write_text_files(tokenizer: Tokenizer, folder: Path) -> None:
    """The files of the model's folder that say how to talk to it: tokenizer, chat template, sampling, teams."""
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
    """A team as teams.json has it."""
    agents = [{"name": name, "prompt": PROMPTS[name]} for name in names]
    return {"parallel": parallel, "layout": "chat", "agents": agents}


def split_team(texts: Sequence[str]) -> dict[str, Any]:
    """A team whose experts each hold a text of their own, and whose summarizer holds the question alone."""
    members = team(*EXPERTS, "summarizer", parallel=True)
    for agent, text in zip(members["agents"], texts, strict=False):
        agent["prompt"] = agent["prompt"].format(question=text)
    return members


def split_example() -> tuple[list[Story], Story]:
    """The stories of split.json, and the one to ask about."""
    return split_stories(random.Random(0), fresh=True)


# -- transcripts -------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Tokens and the weight of predicting each of them."""

    ids: list[int]
    weights: list[float]

    def __add__(self, other: Any) -> "Piece":
        return Piece(self.ids + other.ids, self.weights + other.weights)


class Transcript(NamedTuple):
    """`experts` each start from empty memory; `tail` follows on the joined memory of them all."""

    experts: list[Piece]
    tail: Piece


class Teller:
    """Draws transcripts from one random generator."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.rng = rng
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def draw(self, kinds: dict[str, float], longest: int) -> Transcript:
        """One transcript of a kind drawn by weight: "single", "chain", "direct", "experts" or "split"."""
        kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
        told = story(self.rng, self.rng.randint(1, longest))
        if kind == "single":
            answer = f"<think>{numbers(told.totals)}</think> {told.totals[-1]}"
            return Transcript([], self._turn("solver", told.question, answer))
        if kind == "chain":
            return self._chain(told)
        if (
            kind == "direct"
        ):  # so that a judger without memory is a trained baseline, not a surprised one
            role = self.rng.choice(("judger", "judger", "summarizer"))
            return Transcript([], self._turn(role, told.question, f" {told.totals[-1]}"))
        if kind == "experts":
            asked = [(told.question, f" {told.totals[-1]}")]
            return self._experts([told.question] * 3, [numbers(told.totals)] * 3, asked)
        stories, _ = split_stories(self.rng, 0, min(SPLIT_LONGEST, longest - 1))
        # What an expert hands over ends with whose total it is, and the summarizer says whose it gives. It is asked
        # about all three, in any order: one question a transcript teaches too little of looking things up.
        read = [told.text for told in stories]
        written = [f"{numbers(told.totals)} {told.name} {told.totals[-1]}" for told in stories]
        asked = [
            (told.ask, f" {told.name} {told.totals[-1]}") for told in self.rng.sample(stories, 3)
        ]
        return self._experts(read, written, asked)

    def _chain(self, told: Story) -> Transcript:
        count = self.rng.choices((1, 2, 3), (0.5, 0.2, 0.3))[0]
        roles = sorted(self.rng.sample(CHAIN, count), key=CHAIN.index)
        cut = self._cut()
        tail = Piece([], [])
        for role in roles:
            if cut is None and role != roles[-1] and self.rng.random() < 0.15:
                tail += self._mistaken_turn(role, told)  # later agents repair it
            else:
                tail += self._turn(role, told.question, numbers(told.totals), cut)
        asked = NO_QUESTION if self.rng.random() < 0.25 else told.question
        return Transcript([], tail + self._turn("judger", asked, f" {told.totals[-1]}"))

    def _experts(
        self, read: list[str], written: list[str], asked: list[tuple[str, str]]
    ) -> Transcript:
        """Three experts, and a summarizer's answers to one or more questions."""
        cut = self._cut()
        turns = [
            self._turn(role, q, a, cut) for role, q, a in zip(EXPERTS, read, written, strict=True)
        ]
        tail = Piece([], [])
        for question, answer in asked:
            tail += self._turn("summarizer", question, answer)
        if (
            self.rng.random() < 0.25
        ):  # text_mas: the summarizer reads the three turns one after the other
            return Transcript([], turns[0] + turns[1] + turns[2] + tail)
        return Transcript(turns, tail)

    def _cut(self) -> int | None:
        """After how many tokens a team's turns are closed, ready or not, as latent steps are; None: when ready."""
        return self.rng.randint(0, 8) if self.rng.random() < 0.4 else None

    def _turn(self, role: str, question: str, answer: str, cut: int | None = None) -> Piece:
        prompt = f"<|im_start|>user\n{PROMPTS[role].format(question=question)}<|im_end|>\n<|im_start|>assistant\n"
        before, said, end = self._encode(prompt), self._encode(answer), self._encode(END)
        weights = [1.0] * (len(said) + 1) + [PROMPT_WEIGHT]
        if cut is None:
            return Piece(before + said + end, [PROMPT_WEIGHT] * len(before) + weights)
        # A bounded amount of thought. Too little: the turn is closed early, and closing there is not taught. Too much:
        # the agent runs on into what follows a turn, and is closed once more.
        run = said + end + self._encode("<|im_start|>user\n")
        weights += [PROMPT_WEIGHT] * 3
        closing = [1.0 if cut == len(said) else 0.0, PROMPT_WEIGHT]
        return Piece(
            before + run[:cut] + end,
            [PROMPT_WEIGHT] * len(before) + weights[: len(run[:cut])] + closing,
        )

    def _mistaken_turn(self, role: str, told: Story) -> Piece:
        """A turn with a slip that shifts all later totals; only what was right is taught."""
        slip = self.rng.randrange(1, len(told.totals))
        wrong = self.rng.choice([n for n in range(LARGEST + 1) if n != told.totals[slip]])
        shift = wrong - told.totals[slip]
        shifted = [max(0, min(LARGEST, n + shift)) for n in told.totals[slip:]]
        turn = self._turn(role, told.question, numbers([*told.totals[:slip], *shifted]))
        untaught = slice(
            len(turn.ids) - len(self._encode(END)) - len(shifted),
            len(turn.ids) - len(self._encode(END)),
        )
        turn.weights[untaught] = [0.0] * len(shifted)
        return turn

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]
