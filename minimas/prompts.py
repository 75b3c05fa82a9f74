"""What the agents are told: role prompts and answer forms, as data. No code, and no sentence of the authors'.

A prompt is the user's turn. `{question}` is where the question goes, `{context}` where `text_mas` puts what earlier
agents wrote (empty in `latent_mas`, where it is in memory), `{form}` how the answer must look. Both methods read the
same prompts: a text team with weaker ones would prove nothing. "The work so far" is a memory for the one and a
paragraph for the other. Roles: paper, section 4 and appendix.
"""

ASKED = "\n\nQuestion: {question}{context}"
ANSWERED = ASKED + "\n\n{form}"
NO_ANSWER = " Do not give the final answer."
SOLVED = " Solve the question below"
JUDGED = ": use what is right in it and leave out what is not. Think step by step, then answer the question."

SEQUENTIAL = {
    "planner": "You are the planner of a team. Work out how to solve the question below: what is asked, what is given, "
    "and the steps from one to the other, in order." + NO_ANSWER + ASKED,
    "critic": "You are the critic of a team. Go through the plan in the work so far: name every step that is wrong, "
    "missing or unclear, and say how to mend it." + NO_ANSWER + ASKED,
    "refiner": "You are the refiner of a team. From the plan and the criticism in the work so far, make the best plan: "
    "complete, correct, in order, and short." + NO_ANSWER + ASKED,
    "judger": "You are the judge of a team. You have the work so far" + JUDGED + ANSWERED,
}
HIERARCHICAL = {
    "math expert": "You are the mathematics expert of a team." + SOLVED + " by calculation and logic, step by step, "
    "and check the numbers." + ASKED,
    "science expert": "You are the science expert of a team." + SOLVED + " from facts and principles, step by step, "
    "and check that the result makes sense." + ASKED,
    "code expert": "You are the programming expert of a team." + SOLVED + " as an algorithm: inputs, steps, special "
    "cases, and check it on an example." + ASKED,
    "summarizer": "You are the summarizer of a team. You have the experts' work so far" + JUDGED + ANSWERED,
}
SINGLE = "Think step by step, then answer the question.\n\nQuestion: {question}\n\n{form}"

FORMS = {
    "math": "Put the final answer, a number or an expression alone, in \\boxed{}.",
    "choice": "Put the letter of the right option, alone, in \\boxed{}.",
    "code": "Give one complete, self-contained Python solution in a ```python block.",
    "free": "End with the final answer in one short line.",
}

CONTEXT = "\n\nThe work so far:{work}"
WORK = "\n\n[{name}]\n{text}"
OPTION = "\n({letter}) {text}"

# The questions that the embedded model was trained on; outside of them it knows nothing.
TINY_QUESTION = r"([A-Z]\w\w has \d+ \w+\. ((He|She) \w+ [\w ]+\. )*)?How many \w+ do(es)? [\w ]+ have( together)?\?"
TINY_HINT = (
    "weights/tiny knows only questions such as 'Eva has 2 cards. She finds 7 more. She loses 3. She doubles the cards. "
    "How many cards does Eva have?'; for others, pass --model Qwen/Qwen3-0.6B"
)
