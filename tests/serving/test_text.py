from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.serving.text import TextStream


@settings(max_examples=80, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("abc é🙂\n日"), max_size=40),
    st.lists(st.text("abc é🙂", min_size=1, max_size=4), max_size=3),
)
def test_pieces_are_the_text_up_to_its_first_stop(tokenizer, text, stops):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    whole = tokenizer.decode(ids)
    said = "".join(pieces)
    found = [whole.find(stop) for stop in stops if stop in whole]
    if found:
        assert stream.stopped
        # It stops with the token in which a stop ends, at the earliest stop of the text so far.
        assert said in {whole[: whole.find(stop)] for stop in stops if stop in whole}
    else:
        assert said == whole
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])
