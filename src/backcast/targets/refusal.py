"""The refusal of a target: its reason, with the place in the target."""


class Refused(Exception):
    def __init__(self, place: str, sentence: str) -> None:
        super().__init__(sentence)
        self.place = place
