"""What strangers say, as it may stand on a terminal."""

from tdmld.plaintext import plain


def test_plain_text_stays() -> None:
    assert plain("a state of 3 MiB: größer als erlaubt") == "a state of 3 MiB: größer als erlaubt"


def test_what_would_move_the_cursor_or_turn_the_text_is_replaced() -> None:
    assert plain("a\x1b[2Jb\r\nc\u202ed\x07") == "a\ufffd[2Jb\ufffd\ufffdc\ufffdd\ufffd"
