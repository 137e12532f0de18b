"""Patients from a table instead of from folders, and the check that no patient is in two folds."""

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.cases import Case
from data.splits import FOLDS
from data.store import nfc


def with_patients(cases: Sequence[Case], table: Path, column: str = "patient") -> list[Case]:
    """The cases with the patients of a CSV file in UTF-8, whose first column has the cases' names.

    Raises ValueError, naming the file, for another encoding, a column or a case that is not there, and a case
    of which two lines name different patients."""
    try:
        text = nfc(table.read_text("utf-8-sig"))  # with and without a mark at its start
        header, *rows = [row for row in csv.reader(io.StringIO(text)) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--patients {table}: not a table ({error}); save it as CSV in UTF-8") from error
    if header[1:].count(column) != 1:
        raise ValueError(f"--patients {table}: columns {', '.join(header)}; expected the case in the first "
                         f"and another '{column}', once, see --column")
    patients: dict[str, str] = {}
    for row in rows:
        # Lines without a patient are passed over: it is said below if a case needs one.
        if len(row) == len(header) and row[header.index(column)]:
            name, patient = row[0], row[header.index(column)]
            if patients.setdefault(name, patient) != patient:
                raise ValueError(f"--patients {table}: case {name} is of patient {patients[name]} in a line "
                                 f"and of {patient} in another; expected one patient for each case")
    missing = [case.name for case in cases if case.name not in patients]
    if missing:
        raise ValueError(f"--patients {table}: no patient of {len(missing)} of {len(cases)} cases, such as "
                         f"{missing[0]}")
    return [replace(case, patient=patients[case.name]) for case in cases]


def refuse_divided(cases: Sequence[Case]) -> None:
    """Raises ValueError if a patient is in two of the folds that the cases came in."""
    fold_of_patient: dict[str, str] = {}
    for case in cases:
        fold = case.name.partition("/")[0]
        if fold in FOLDS and fold_of_patient.setdefault(case.patient, fold) != fold:
            raise ValueError(f"{case.image}: patient {case.patient} is in {fold} and in "
                             f"{fold_of_patient[case.patient]}; put all of a patient into one, or name "
                             "patients with --patients")
