"""Exception classes. The command line shows the flag in place of a parameter's name."""


class ParameterError(ValueError):
    """A parameter of a public function has a value that cannot work.

    `parameter` is its name and `problem` the text "found X, expected Y". The message is
    "parameter: found X, expected Y".
    """

    def __init__(self, parameter: str, problem: str) -> None:
        super().__init__(parameter, problem)
        self.parameter = parameter
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.parameter}: {self.problem}"


class ContextError(ValueError):
    """An agent's turn needs more slots of the KV cache than the model's context has."""
