"""`handle_signals`: for the block alone, or until `restore`; other threads leave signals as they are."""

import signal
import threading

import pytest

from alignment.signals import handle_signals


def test_a_handler_is_there_for_the_block_or_until_it_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), handle_signals(signal.default_int_handler, signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with handle_signals(signal.default_int_handler, signal.SIGTERM) as restore:
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        restore()
        assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_handles_no_signals() -> None:
    seen = []

    def work() -> None:
        with handle_signals(signal.default_int_handler, signal.SIGTERM):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
