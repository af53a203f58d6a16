"""Phones of English, and their names in espeak-ng."""

from ray_distill.pipeline.probing.task import SILENCE

# espeak-ng has several names for a sound, by accent and position. Those that are not listed here have no label.
_NAMES = {
    SILENCE: "_ _: _:: _! _|",
    "AA": "A: A@ A",
    "AE": "a aa &",
    "AH": "V",
    "AO": "O: O@ o@ O",
    "AW": "aU",
    "AX": "@ @2 a# @- @5 E-",
    "AY": "aI aI2 aI@ aI3",
    "B": "b",
    "CH": "tS",
    "D": "d d[",
    "DH": "D",
    "EA": "e@",
    "EH": "E",
    "ER": "3: 3 IR VR",
    "EY": "eI",
    "F": "f",
    "G": "g",
    "HH": "h",
    "IA": "i@ i@3",
    "IH": "I I2 I#",
    "IY": "i: i",
    "JH": "dZ",
    "K": "k",
    "L": "l @L",
    "M": "m",
    "N": "n",
    "NG": "N",
    "OH": "0 O2",
    "OW": "oU",
    "OY": "OI",
    "P": "p",
    "R": "r r- R R2 * **",
    "S": "s",
    "SH": "S",
    "T": "t t# t2 t[",
    "TH": "T",
    "UH": "U U@",
    "UW": "u: u",
    "V": "v",
    "W": "w w#",
    "Y": "j ;",
    "Z": "z",
    "ZH": "Z",
}

PHONES = tuple(_NAMES)
"""Labels, in the order of the teacher's classes. They are those of the CMU dictionary, with AX, EA, IA and OH of British English."""

_LABELS = {name: label for label, names in _NAMES.items() for name in names.split()}
_STRESS = "',%="


def label_of(name: str) -> str | None:
    """Return the label of a phoneme of espeak-ng, such as ``'i:``; None if no phone of English has this name.

    A change of language within a sentence, such as ``(en)``, has no label either.
    """
    return _LABELS.get(name.lstrip(_STRESS))
