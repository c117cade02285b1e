"""What a run says: messages of an engine's logger, a line each."""

import io
import logging

import pytest
from rich.console import Console

from harness.progress import Reporter


def test_messages_below_a_logger_are_said_and_go_nowhere_else(caplog):
    said, below = io.StringIO(), logging.getLogger("engines.some.module")
    reporter = Reporter(Console(file=said))
    below.info("nobody asks for it yet")
    with reporter.relaying("engines"):
        below.info("%d of %d [kernels]", 3, 7)
        below.debug("too much")
        logging.getLogger("other").info("of others")
        below.warning("with its level and all")
    below.info("nobody asks any more")
    below.warning("as always")
    assert said.getvalue() == "  3 of 7 [kernels]\n"
    assert caplog.messages == ["with its level and all", "as always"]


def test_a_message_that_does_not_fit_fails_no_start(capsys):
    with Reporter(Console(file=io.StringIO())).relaying("engines"):
        logging.getLogger("engines").info("%d kernels", "no number")
    assert "TypeError" in capsys.readouterr().err  # as logging tells of it


def test_an_error_ends_it():
    logger = logging.getLogger("engines")
    before = logger.level, logger.propagate, list(logger.handlers)
    with pytest.raises(RuntimeError), Reporter(Console(file=io.StringIO())).relaying("engines"):
        assert logger.isEnabledFor(logging.INFO)
        raise RuntimeError
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
