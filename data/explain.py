"""An example as text that shows what is trained: the first thing to look at before a run."""

from data.labels import NO_LOSS, Example


def explain(example: Example, tokenizer, colour: bool = True) -> str:
    """The example as text: supervised tokens green (or in [[ ]]), pictures as <N picture positions>."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    pictures = {start: end for start, end in example.image_spans}
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    text, place = [], 0
    while place < len(ids):
        if place in pictures:
            text.append(f"<{pictures[place] - place} picture positions>")
            place = pictures[place]
            continue
        trained = labels[place] != NO_LOSS
        end = place + 1
        while end < len(ids) and end not in pictures and (labels[end] != NO_LOSS) == trained:
            end += 1
        run = tokenizer.decode(ids[place:end], skip_special_tokens=False)
        text.append(opening + run + closing if trained else run)
        place = end
    return "".join(text)
