"""What graders have in common that compute their grades: the same again every time, nothing kept."""


class Offline:
    """Base of graders that are functions of label and answer; `Grader` says what the fields mean."""

    version = "1"
    settings = ""
    deterministic = True
    cached = False
    batch = 4096
