"""What papers report, to stand below our rows: numbers of each system on each data set, with their source."""

from dataclasses import dataclass, field, replace

from metadata_manager import METHODS

Scores = dict[str, tuple[float, float | None]]  # mean, and standard deviation over runs or None

TABLE_1, TABLE_2, TABLE_4 = "paper's Table 1", "paper's Table 2", "paper's Table 4"
CCDM = "CCDM's Table 1"  # arXiv 2303.08888: the source of the paper's rows of MoSE, CIMD, AB and CCDM


@dataclass(frozen=True)
class Published:
    """A row of a published table. note: printed below our table, what a reader has to know of the numbers."""

    source: str
    scores: Scores = field(default_factory=dict)
    note: str = ""


def _table(source: str, columns: str, rows: str) -> dict[str, Published]:
    """A published table: each row a name, then a mean or mean+-std per column, - where none is given."""
    table = {}
    for line in rows.strip().splitlines():
        name, *cells = (cell.strip() for cell in line.split("|"))
        numbers = {column: cell.split("+-") for column, cell in zip(columns.split(), cells) if cell != "-"}
        table[name] = Published(source, {column: (float(number[0]), float(number[1]) if number[1:] else None)
                                         for column, number in numbers.items()})
    return table


# Means and standard deviations of five runs. Lower GED is better.
PAPER: dict[str, dict[str, Published]] = {
    "LIDC": _table(TABLE_1, "GED16 GED32 GED100 HM-IoU32 MDM32", """
        prob-unet   | .310+-.010 | .303+-.010 | .252+-.004 | .548+-.000 | .681+-.020
        phiseg      | .262       | .247       | .224+-.004 | .595       | .704+-.020
        ssn         | .259       | .243+-.010 | .225+-.002 | .550+-.010 | -
        P2SAM       | .208       | .206       | -          | .627       | .939
        atfm        | .206+-.002 | .188+-.001 | .162+-.002 | .667+-.002 | .948+-.001"""),
    "isic3_style_concat": _table(TABLE_2, "GED16 GED32 GED100 HM-IoU32 MDM32", """
        prob-unet      | .202+-.003 | .187+-.003 | .171+-.002 | .697+-.005 | .927+-.003
        ssn            | .197+-.007 | .181+-.004 | .167+-.002 | .700+-.004 | .939+-.001
        c-prob-unet    | .208+-.004 | .202+-.005 | .179+-.002 | .719+-.004 | .925+-.004
        c-ssn          | .200+-.007 | .195+-.007 | .177+-.001 | .725+-.004 | .931+-.003
        atfm           | .183+-.001 | .152+-.002 | .147+-.003 | .732+-.003 | .942+-.002"""),
    "MMIS": {},
}
# Rows that the paper takes from CCDM, in the columns that CCDM's table has them in; MDM is the paper's. CCDM
# does not say n of HProb. U-Net's numbers: they stand in the first column of each score, as there.
PAPER["LIDC"] |= _table(CCDM, "GED16 GED32 GED50 GED100 HM-IoU16 HM-IoU32 MDM32", """
    mose         | .218+-.003 | -          | .195+-.002 | .189+-.002 | .624+-.004 | -          | .767+-.004
    cimd         | .234       | .218       | .210       | .321       | .587       | .592+-.002 | .915+-.004
    ab           | .213+-.001 | .196+-.002 | .193+-.002 | -          | .614       | .619+-.001 | .792+-.002
    ccdm         | .212+-.001 | .194+-.001 | .187       | .183+-.002 | .623       | .631+-.002 | .790+-.003
    JProb. U-Net | -          | .206       | -          | -          | -          | .647       | -
    PixelSeg     | .243       | -          | -          | -          | .614       | -          | -
    cFlow        | -          | .225       | -          | -          | -          | .584       | -
    HProb. U-Net | .270       | -          | -          | -          | .530       | -          | -""")
NOTES = {
    "mose": "the paper's Table 1 prints its GED50, 0.195, as GED32 and its HM-IoU16, 0.624, as HM-IoU32",
    "ab": "the paper's Table 1 prints its GED50, 0.193, as GED100",
    "cimd": "as run by CCDM's authors; GED100 is CIMD's own paper's, of another model",
}
PAPER["LIDC"] |= {name: replace(PAPER["LIDC"][name], note=note) for name, note in NOTES.items()}
# The ablation on LIDC; its row of ATFM is that of Table 1.
PAPER["LIDC"] |= _table(TABLE_4, "GED100 HM-IoU32", """
    act-gtr    | .230 | .550
    sfm-no-sf  | .185 | .624
    sfm        | .176 | .631
    atfm-no-sf | .249 | .597""")
# CFM's numbers are of M = 15 samples, to be compared with --samples 15.
CFM = "arXiv 2507.22418"
PAPER["LIDC"]["cfm"] = Published(CFM, {"Dice of means": (0.595, None)})
PAPER["MMIS"] |= dict.fromkeys(("cfm", "cfm-mmis"), Published(CFM, {"GED15": (0.231, None),
                                                                    "Dice of means": (0.785, None)}))
PAPER["MMIS"]["prob-unet"] = Published(CFM, {"GED15": (0.227, None)})
PAPER["LIDC"]["flow-ssn"] = Published("its paper", {"GED100": (0.181, None)},
                                      "its paper splits LIDC by series")

# GPU seconds for 100 samples of an image, on an RTX 3090 (Table 3).
PAPER_SECONDS = {"LIDC": {"cimd": 420, "ab": 1050, "ccdm": 1100, "atfm": 113}}


def published(what: str, method: str) -> Published | None:
    """What a paper reports for a system on a data set, if one does."""
    return PAPER.get(what, {}).get(method)


def not_trained_here(what: str) -> dict[str, Published]:
    """What papers report on a data set for systems that this project does not have."""
    return {name: row for name, row in PAPER.get(what, {}).items() if name not in {"act-gtr", *METHODS}}
