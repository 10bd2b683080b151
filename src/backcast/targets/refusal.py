"""The refusal of a target: its reason, with the place in the target."""


def escaped(part: str) -> str:
    """A part of a JSON pointer."""
    return part.replace("~", "~0").replace("/", "~1")


class Refused(Exception):
    def __init__(self, place: str, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place
