"""Role prompts and answer forms, as data.

This file holds no code, and no sentence that the paper's authors wrote.

`OPENING` comes before every prompt. If all agents share one user turn, it comes only before the
first and the last prompt (see `Team`). The last agent has the same prompt as a single agent. In a
prompt, `{question}` stands for the question, `{form}` for the form of the answer, and `{context}`
for the text that earlier agents generated in `text_mas`. `{context}` is empty in `latent_mas`,
where their work is in the KV cache. Only `CONTEXT` mentions that work, so no agent is told of
something that it cannot see. The roles are those of the paper, section 4 and appendix.
"""

OPENING = "Question: {question}"

SEQUENTIAL = {
    "planner": "You are the planner of a team. Work out what is asked, what is given, and which "
    "steps lead from one to the other.{context}",
    "critic": "You are the critic of the team. Work out which mistakes are easy to make with this "
    "question, and how to avoid them.{context}",
    "refiner": "You are the refiner of the team. Work out the best way to the answer: complete, "
    "correct, in order, and short.{context}",
    "judger": "{context}\n\n{form}",
}
HIERARCHICAL = {
    "math expert": "You are the mathematics expert of a team. Work out the answer by calculation "
    "and logic, step by step, and check the numbers.",
    "science expert": "You are the science expert of a team. Work out the answer from facts and "
    "principles, step by step, and check that the result makes sense.",
    "code expert": "You are the programming expert of a team. Work out the answer as an algorithm: "
    "inputs, steps, special cases, and check it on an example.",
    "summarizer": "{context}\n\n{form}",
}
SINGLE = "{form}"

FORMS = {
    "math": "Reason step by step, and put the final answer, a number or an expression alone, "
    "in \\boxed{}.",
    "choice": "Reason step by step, and put the letter of the right option, alone, in \\boxed{}.",
    "code": "Give one complete, self-contained Python solution in a ```python block.",
    "free": "End with the final answer in one short line.",
}

CONTEXT = (
    "\n\nThe work of the team so far; use what is right in it, and leave out what is not:{work}"
)
WORK = "\n\n[{name}]\n{text}"
OPTION = "\n({letter}) {text}"

# The form of the questions that weights/tiny was trained on. It cannot answer any others.
TINY_QUESTION = (
    r"([A-Z]\w\w has \d+ \w+\. ((He|She) \w+ [\w ]+\. )*)?"
    r"How many \w+ do(es)? [\w ]+ have( together)?\?"
)
TINY_HINT = (
    "weights/tiny knows only questions such as 'Eva has 2 cards. She finds 7 more. She loses 3. "
    "She doubles the cards. How many cards does Eva have?'; for others, pass --model "
    "Qwen/Qwen3-0.6B"
)
