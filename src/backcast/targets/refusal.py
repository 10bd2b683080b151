"""Why a target is refused, and at which place of it."""


class Refused(Exception):
    def __init__(self, place: str, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place
