"""The training methods, in the order in which tables list them: name, printed title, and where the class stands.

This is the one list of them. It knows no torch, since help texts and tables over finished runs need names alone. A
method of one's own is named by where it stands, "package.module:Class".
"""

from __future__ import annotations

from typing import NamedTuple


class Method(NamedTuple):
    """A method's printed title, and its class as "package.module:Class"."""

    title: str
    where: str


METHODS: dict[str, Method] = {
    "base": Method("Base", "gdpd.distillers.base_ce:Base"),
    "kd": Method("Base-KD", "gdpd.distillers.kd:KD"),
    "fits": Method("Fits", "gdpd.distillers.fits:Fits"),
    "at": Method("AT", "gdpd.distillers.at:AT"),
    "rkd": Method("RKD", "gdpd.distillers.rkd:RKD"),
    "pkt": Method("PKT", "gdpd.distillers.pkt:PKT"),
    "vid": Method("VID", "gdpd.distillers.vid:VID"),
    "dkd": Method("DKD", "gdpd.distillers.dkd:DKD"),
    "dt2w": Method("DT2W", "gdpd.distillers.dt2w:DT2W"),
    "tekap": Method("TeKAP", "gdpd.distillers.tekap:TeKAP"),
    "ttm": Method("TTM", "gdpd.distillers.ttm:TTM"),
    "wttm": Method("WTTM", "gdpd.distillers.ttm:WTTM"),
    "pld": Method("PLD", "gdpd.distillers.pld:PLD"),
    "lelp": Method("LELP", "gdpd.distillers.lelp:LELP"),
    "taid": Method("TAID", "gdpd.distillers.taid:TAID"),
    "diffkd": Method("DiffKD", "gdpd.distillers.diffkd:DiffKD"),
    "gdpd": Method("GDPD", "gdpd.distillers.gdpd:GDPD"),
    "gendd": Method("GenDD", "gdpd.distillers.gendd:GenDD"),
}
TEACHER = "teacher"  # stands beside the methods in tables


def method_title(name: str) -> str:
    """The method's name as it is written in tables; of a method of one's own, the name of its class."""
    if name == TEACHER:
        return "Teacher"
    return METHODS[name].title if name in METHODS else name.rpartition(":")[2]


def method_order(name: str) -> tuple[int, str]:
    """Sort key of tables: the teacher, the methods as they are listed here, then others by name."""
    known = [TEACHER, *METHODS]
    return (known.index(name) if name in known else len(known), name)
