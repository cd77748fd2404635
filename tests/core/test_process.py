import os
import signal
import threading

from ns.core.process import handle_signals


def test_handle_signals_restores_the_handlers_before():
    heard, before = [], signal.getsignal(signal.SIGINT)
    with handle_signals(lambda number, _: heard.append(("outer", number)), [signal.SIGTERM]):
        with handle_signals(lambda number, _: heard.append(("inner", number))):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    inner = [("inner", number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)]
    assert heard == [*inner, ("outer", signal.SIGTERM)]
    assert signal.getsignal(signal.SIGINT) is before


def test_handle_signals_does_nothing_in_a_thread():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with handle_signals(lambda *_: None):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]
