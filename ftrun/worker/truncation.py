"""Where sequences that are too long are cut: prompts lose their middle, and no reply is lost whole."""

from __future__ import annotations

from collections.abc import Sequence

from ftrun.worker.sequence import Encoded


def share(prompt: int, reply: int, room: int) -> int:
    """Return how many of ``room`` tokens a prompt gets, where prompt and reply together are longer.

    The shorter of the two stays whole if it takes less than half of the room; else each gives up the same share. A
    reply always keeps at least one token.
    """
    if 2 * reply < room:
        kept = reply
    elif 2 * prompt < room:
        kept = room - prompt
    else:
        kept = room * reply // (prompt + reply)
    return min(prompt, room - max(1, kept))


def cut(sequences: Sequence[Encoded], limit: int, *, open_end: bool = False) -> list[Encoded]:
    """Cut sequences with a common prompt, or a single one, down to ``limit`` tokens each.

    A prompt that takes too much of the room (`share`) loses its middle: its beginning holds the system message and the
    task, its end the latest turn and the opening of the reply. Then the sequence is cut at its end, and a later
    prompt that no reply follows is left out too. Of several sequences, all keep the same part of the prompt.

    Args:
        sequences: What to cut.
        limit: Most tokens that each may have.
        open_end: All of the text is learned, so it is cut at its end and nowhere else.
    """
    replies = [next((span for span in sequence.replies if _touches(sequence, span)), None) for sequence in sequences]
    if open_end or not any(replies):
        if not open_end and not any(sequence.spans for sequence in sequences):  # prompts alone
            return [_without(s, limit - limit // 2, len(s.ids) - limit // 2) for s in sequences]
        return [_without(sequence, limit, len(sequence.ids)) for sequence in sequences]
    known = [span for span in replies if span]
    prompt = min(start for start, _ in known)
    kept = share(prompt, max(end - start for start, end in known), limit)
    head = kept - kept // 2
    shorter = [_without(sequence, head, prompt - kept // 2) for sequence in sequences]
    return [_without(sequence, _end(sequence, limit), len(sequence.ids)) for sequence in shorter]


def cut_each_at_its_end(sequences: Sequence[Encoded], limit: int) -> list[Encoded]:
    """Cut the prompt that sequences have in common at its end, and each reply at its own: LLaMA-Factory's rule."""
    prompt = min(sequence.spans[0] for sequence in sequences)
    kept = share(prompt, max(len(sequence.ids) for sequence in sequences) - prompt, limit)
    shorter = [_without(sequence, kept, prompt) for sequence in sequences]
    return [_without(sequence, limit, len(sequence.ids)) for sequence in shorter]


def cut_turns(sequence: Encoded, limit: int, *, last_first: bool) -> Encoded:
    """Share the room among turns, one after the other, each cut at the ends of its prompt and its reply.

    LLaMA-Factory's rule: what is left of the room goes to the next turn, and turns that find none are left out. The
    opening of a reply is lost with the end of its prompt.

    Args:
        sequence: The turns, each a prompt and a reply.
        limit: Most tokens to keep.
        last_first: Give room to the last turn first.
    """
    starts = [0, *(end for _, end in sequence.replies[:-1])]
    turns = [(start, *reply) for start, reply in zip(starts, sequence.replies, strict=True)]
    ends: dict[int, tuple[int, int]] = {}
    room = limit
    for number in reversed(range(len(turns))) if last_first else range(len(turns)):
        start, border, end = turns[number]
        prompt, reply = border - start, end - border
        if prompt + reply > room:
            prompt = share(prompt, reply, room) if room > 1 else 0
            reply = min(reply, room - prompt)
        ends[number] = (start + prompt, border + reply)
        room -= prompt + reply
    for number in reversed(range(len(turns))):
        start, border, end = turns[number]
        sequence = _without(_without(sequence, ends[number][1], end), ends[number][0], border)
    return _without(sequence, limit, len(sequence.ids))


def _touches(sequence: Encoded, reply: tuple[int, int]) -> bool:
    """Tell whether anything of a reply is learned."""
    spans = zip(sequence.spans[::2], sequence.spans[1::2], strict=True)
    return any(start < reply[1] and end > reply[0] for start, end in spans)


def _end(sequence: Encoded, limit: int) -> int:
    """Return where to end a sequence so that no prompt is left without anything learned behind it."""
    if len(sequence.ids) <= limit:
        return len(sequence.ids)
    inside = [
        min(end, limit) for start, end in zip(sequence.spans[::2], sequence.spans[1::2], strict=True) if start < limit
    ]
    return max(inside, default=limit)


def _without(sequence: Encoded, start: int, end: int) -> Encoded:
    """Return a sequence without the tokens from ``start`` to ``end``."""
    if end <= start:
        return sequence

    def moved(position: int) -> int:
        return min(position, start) if position < end else position - (end - start)

    out = Encoded(sequence.ids[:start] + sequence.ids[end:])
    for index, weight in enumerate(sequence.weights):
        first, last = (moved(position) for position in sequence.spans[2 * index : 2 * index + 2])
        if first < last:
            out.spans += (first, last)
            out.weights.append(weight)
    spans = ((moved(first), moved(last)) for first, last in sequence.replies)
    out.replies = [(first, last) for first, last in spans if first < last]
    if sequence.labels is not None:
        out.labels = sequence.labels[:start] + sequence.labels[end:]
    return out
