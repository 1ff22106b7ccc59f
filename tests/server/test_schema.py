from __future__ import annotations

from dataclasses import replace

from server.app import create_app
from tests.server.conftest import SETTINGS
from tests.server.fake_engine import FakeEngine
from tests.server.schema_cases import check_schema


def test_answers_are_as_described(engine: FakeEngine) -> None:
    engine.max_model_len = 24
    app = create_app(engine, replace(SETTINGS, host="0.0.0.0", max_n=2))
    statuses = check_schema(app, 32, random_seed=1)
    app.state.context.close()
    assert statuses[200] > 5 and statuses[400] > 5
    assert engine.wait_idle()
