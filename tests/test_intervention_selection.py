"""Which features a part holds: classes, ids, and conditions that can ask for nothing but features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from glottoscope.errors import InputError
from glottoscope.intervention.selection import select

LANGUAGES = ("en", "ja")
TABLE = pa.table(
    {
        "feature": pa.array(range(8), pa.int32()),
        "alive": [True, True, True, True, True, True, False, False],
        "language": ["en", "mixed", "ja", "mixed", "en", "unclassified", "dead", "mixed"],
        # The last two are not alive: whatever else the table says of them, no class holds them.
        "bilingual": [False, True, False, None, False, None, None, True],
        "bilingual_paper": [False, True, False, True, False, False, True, True],
        "phi": [0.1, 0.9, None, 0.7, None, 0.2, None, 0.9],
        "density": [0.1, 0.2, 0.3, 0.1, 0.0, 0.5, 0.0, 0.0],
    }
)


def chosen(wanted: str | list[int], table: pa.Table = TABLE) -> list[int]:
    found = select(table, wanted, LANGUAGES)
    assert found.dtype == np.bool_ and found.shape == (table.num_rows,)
    return np.flatnonzero(found).tolist()


def test_classes_hold_alive_features_only() -> None:
    assert chosen("en") == [0, 4] and chosen("ja") == [2]
    assert chosen("mixed") == [1, 3]
    assert chosen("bilingual") == [1]  # null, where there are no aligned sentences, is not known to be
    assert chosen("bilingual_paper") == [1, 3]
    assert chosen("all") == [0, 1, 2, 3, 4, 5]


def test_a_table_without_aligned_sentences_has_no_bilingual_feature() -> None:
    column = TABLE.schema.get_field_index("bilingual")
    for nulls in (pa.nulls(8, pa.bool_()), pa.nulls(8)):
        assert chosen("bilingual", TABLE.set_column(column, "bilingual", nulls)) == []
    dead = TABLE.set_column(TABLE.schema.get_field_index("alive"), "alive", pa.array([False] * 8))
    assert [chosen(name, dead) for name in ("en", "mixed", "bilingual", "all")] == [[], [], [], []]


def test_ids() -> None:
    assert chosen([3, 0, 3, 6]) == [0, 3, 6]  # asked for by number, a feature need not be alive
    assert chosen([]) == []
    for wanted, named in (([0, 8], 8), ([-1], -1), ([1, 1000, 9], 1000)):
        with pytest.raises(InputError, match=f"^feature {named} does not exist: the SAE has 8, numbered from 0$"):
            select(TABLE, wanted, LANGUAGES)


@pytest.mark.parametrize(("condition", "expected"), [
    ("phi > 0.6", [1, 3, 7]),  # null is not above anything
    ("phi > 0.6 AND alive", [1, 3]),
    ("language = 'mixed' and density >= 0.2 or feature = 5", [1, 5]),
    ("language in ('en', 'ja')", [0, 2, 4]),
    ("density > (select avg(density) from features where alive)", [2, 5]),
    ("phi is null", [2, 4, 6]),
    ("false", []),
    ("true -- all of them", list(range(8))),
])  # fmt: skip
def test_conditions(condition: str, expected: list[int]) -> None:
    assert chosen(condition) == expected


@pytest.mark.parametrize(("condition", "says"), [
    ("phii > 0.6", 'Binder Error: Referenced column "phii" not found'),
    ("phi >", "Parser Error"),
    ("", "Parser Error"),
    ("Mixed", "Binder Error"),  # classes are written small
    ("de", "Binder Error"),  # a language that the study does not have
    ("language", "Conversion Error"),
    ("sum(phi) > 1", "Binder Error"),
    ("true, false", "Parser Error"),
    ("true; DROP VIEW features", "Parser Error"),
    # Whoever closes the bracket to add a query of his own
    ("feature = 0) UNION ALL (SELECT 999", "Parser Error"),
    ("1 = 1); SELECT 7 WHERE (1 = 1", "Parser Error"),
])  # fmt: skip
def test_what_is_no_condition_is_said_in_one_line(condition: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        select(TABLE, condition, LANGUAGES)
    message = str(error.value)
    assert message.startswith(f"features {condition!r} is no condition on the feature table (") and says in message
    assert message.endswith("): see docs/tables.md") and "\n" not in message


def test_a_condition_reads_no_file(tmp_path: Path) -> None:
    secret, new = tmp_path / "secret.csv", tmp_path / "new.csv"
    secret.write_text("feature\n3\n")
    for condition in (
        f"feature IN (SELECT feature FROM '{secret}')",
        f"feature IN (SELECT feature FROM read_csv('{secret}'))",
        f"feature IN (SELECT length(file) FROM glob('{tmp_path}/*'))",
        f"feature = (SELECT length(content) FROM read_text('{secret}'))",
        f"true; COPY (SELECT 1) TO '{new}'",
        "true; SET enable_external_access = true",
    ):
        with pytest.raises(InputError, match="is no condition on the feature table"):
            select(TABLE, condition, LANGUAGES)
    assert not new.exists()
