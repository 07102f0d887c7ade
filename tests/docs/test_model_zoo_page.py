"""The page about the published models says what the facts and the counted costs say."""

import pytest


pytest.importorskip("yaml")

from model_zoo_page import PAGE, page


@pytest.mark.slow
def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run python tests/model_zoo_page.py"
