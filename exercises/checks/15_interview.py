"""Checks of exercise 15: they name the mistake and stay silent about the solution."""

import torch

from checks import Mistake

_ROLES = {"system": 7, "user": 8, "assistant": 9}
_TEXTS = {"Hi": [1], "How are you?": [2, 3, 4], "Fine": [5], "Be brief": [6, 2], "Why?": [4, 4]}


def _row(turns, end, roles, trains):
    """Ids and labels; `trains` says which ids (role, last turn?, kind) are targets."""
    ids, labels = [], []
    for i, (role, text) in enumerate(turns):
        kinds = [("role", roles[role]), *(("text", t) for t in _TEXTS[text]), ("end", end)]
        ids += [token for _, token in kinds]
        last = i == len(turns) - 1
        labels += [token if trains(role, last, kind) else -100 for kind, token in kinds]
    return ids, labels


def chat_row(answer):
    """Check a function (turns, encode, role_ids, end_id) -> (ids, labels)."""
    talks = [
        (
            [
                ("user", "Hi"),
                ("assistant", "Fine"),
                ("user", "Why?"),
                ("assistant", "How are you?"),
            ],
            0,
            _ROLES,
        ),
        (
            [("system", "Be brief"), ("assistant", "Hi"), ("user", "Hi"), ("assistant", "Hi")],
            11,
            _ROLES,
        ),
        # One id begins every turn, and the texts hold the ids of a beginning and of an end.
        (
            [
                ("user", "Be brief"),
                ("assistant", "Be brief"),
                ("user", "Fine"),
                ("assistant", "Fine"),
            ],
            2,
            {"user": 5, "assistant": 5},
        ),
    ]
    for turns, end, roles in talks:
        before = dict(roles), list(turns)
        got = answer(turns, lambda text: list(_TEXTS[text]), roles, end)
        if (dict(roles), list(turns)) != before:
            raise Mistake("The turns or role ids that were passed in have been changed.")
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Mistake("Return two things, the input ids and the labels.")
        ids, labels = got
        if isinstance(ids, torch.Tensor) or isinstance(labels, torch.Tensor):
            raise Mistake("Return lists; batches are made of them later.")
        if not isinstance(ids, list) or not isinstance(labels, list):
            kinds = f"a {type(ids).__name__} and a {type(labels).__name__}"
            raise Mistake(f"The ids and labels should be two lists, not {kinds}.")
        right_ids, right = _row(turns, end, roles, lambda role, last, kind: (
            role == "assistant" and kind != "role"))  # fmt: skip
        if ids != right_ids:
            without = [token for token in right_ids if token != end]
            if ids == without:
                raise Mistake("The turns do not end: the id that ends a turn stands nowhere.")
            if ids == right_ids[:-1]:
                raise Mistake("The last turn does not end.")
            if ids == [token for token in right_ids if token not in roles.values()]:
                raise Mistake("No turn says whose it is: the ids of the roles are missing.")
            raise Mistake(f"The input ids are {ids}; for {turns} they should be {right_ids}.")
        if len(labels) != len(ids):
            raise Mistake(f"There are {len(labels)} labels for {len(ids)} ids; a label per id.")
        _explain_labels(turns, end, roles, labels, right)


def _explain_labels(turns, end, roles, labels, right):
    if labels == right:
        return

    def row(trains):
        return _row(turns, end, roles, trains)[1]

    known = {
        "The labels are shifted already. The model does that itself, so these would be off by one.":
            [*right[1:], -100],
        "All turns are trained, the user's too.":
            row(lambda role, last, kind: kind != "role"),
        "Nothing is masked: every id is a target.": row(lambda *_: True),
        "Only the last turn of the assistant is trained; each of its turns should be.":
            row(lambda role, last, kind: last and role == "assistant" and kind != "role"),
        "The end of the assistant's turns is not a target, so the model never learns to stop.":
            row(lambda role, last, kind: role == "assistant" and kind == "text"),
        "The role of the assistant is a target, but the program writes it, not the model.":
            row(lambda role, last, kind: role == "assistant"),
        "The end of every turn is a target; those of the other roles should not be.":
            row(lambda role, last, kind:
                kind == "end" or role == "assistant" and kind == "text"),
        "The users' turns are trained and the assistant's are masked: it is the other way around.":
            row(lambda role, last, kind: role != "assistant" and kind != "role"),
    }  # fmt: skip
    for told, wrong in known.items():
        if labels == wrong:
            raise Mistake(told)
    zeros = [0 if label == -100 else label for label in right]
    if labels == zeros:
        raise Mistake("What is not a target has the label 0, which is a token; it should be -100.")
    if len(set(roles.values())) < len(roles):
        raise Mistake(
            "Here one id begins every turn, and texts hold it and the id of the end. What is a "
            "target is known from the turn and cannot be looked for in the ids."
        )
    if labels.count(end) > right.count(end):
        raise Mistake("More ends of turns are targets than the assistant has turns.")
    raise Mistake(
        f"The labels are {labels}. In {turns} the assistant's texts and the ends of its turns are "
        "targets, wherever the same ids stand elsewhere."
    )


def ring_all_reduce(answer):
    """Check a function [(n,), ...] -> (results, numbers sent)."""
    torch.manual_seed(0)
    for N, n in ((3, 9), (2, 8), (4, 4), (1, 3), (5, 15)):
        vectors = [torch.randint(1, 9, (n,)).float() for _ in range(N)]
        before = [vector.clone() for vector in vectors]
        total = sum(before)
        try:
            got = answer(vectors)
        except NotImplementedError:
            raise
        except (ZeroDivisionError, IndexError, RuntimeError) as error:
            raise Mistake(
                f"{N} rank(s) with {n} numbers each end in {type(error).__name__}: "
                f"{str(error).splitlines()[0]}."
            ) from error
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise Mistake("Return two lists: the results, and how many numbers each rank sent.")
        results, sent = got
        if any(not torch.equal(*pair) for pair in zip(vectors, before, strict=True)):
            raise Mistake("The vectors that were passed in have been changed; work on copies.")
        if len(results) != N or len(sent) != N:
            raise Mistake(
                f"With {N} ranks there are {len(results)} results and {len(sent)} counts."
            )
        _results(results, before, total, N, n)
        _sent(sent, N, n)


def _results(results, before, total, N, n):
    wrong = [rank for rank in range(N) if not torch.equal(torch.as_tensor(results[rank]), total)]
    if not wrong:
        addresses = {result.data_ptr() for result in results}
        if len(addresses) < N:
            raise Mistake(
                "Several ranks share one tensor. Each holds its own copy: a change on one rank "
                "must not reach the others."
            )
        return
    if any(result.shape != (n,) for result in results):
        raise Mistake(f"A result has the shape {tuple(results[wrong[0]].shape)}, not ({n},).")
    if all(torch.allclose(result, total / N) for result in results):
        raise Mistake("The results are means; an all-reduce returns sums, the caller may divide.")
    if all(torch.equal(*pair) for pair in zip(results, before, strict=True)):
        raise Mistake("The results are what the ranks began with: nothing was added.")
    full = [
        [torch.equal(one, sums) for one, sums in zip(*(x.chunk(N) for x in pair), strict=True)]
        for pair in ((result, total) for result in results)
    ]
    if any(result.max() > total.max() for result in results):
        raise Mistake(
            f"With {N} ranks a result is larger than the sum: something is added twice. In the "
            "second half a chunk replaces what stood there; within a round, send before you add."
        )
    if N > 1 and all(sum(row) == 1 for row in full):
        raise Mistake(
            f"With {N} ranks each one has one chunk of the sum and {N - 1} unfinished: the "
            "all-gather is missing."
        )
    done = sum(map(sum, full))
    raise Mistake(
        f"With {N} ranks {done} of {N * N} chunks end as the sum. Which chunk did a rank just add "
        "to? That one it sends next."
    )


def _sent(sent, N, n):
    sent = [int(count) for count in sent]
    right = 2 * (N - 1) * n // N
    if sent == [right] * N:
        return
    told = f"With {N} ranks and {n} numbers the counts are {sent}. "
    if sent == [2 * (N - 1)] * N:
        raise Mistake(f"{told}These are chunks, or rounds; count the numbers in them.")
    if sent == [4 * right] * N:
        raise Mistake(f"{told}These are bytes; count numbers.")
    if sent == [right // 2] * N:
        raise Mistake(f"{told}Only one half of the rounds is counted; in both of them ranks send.")
    if sent == [2 * (N - 1) * n] * N:
        raise Mistake(f"{told}A rank sends one chunk in each round, not the whole vector.")
    if sum(sent) == right * N or len(set(sent)) > 1:
        raise Mistake(f"{told}In a ring every rank sends equally much.")
    raise Mistake(f"{told}There are 2(N - 1) rounds, in each a rank sends one chunk.")


_PACKED = [
    [([5, 6, 7], [5, -100, 7]), ([8, 9], [8, 9])],
    [([4, 4], [-100, 4]), ([3, 9, 2, 6], [-100, 9, -100, 6]), ([7, 8, 5], [7, 8, 5])],
    [([5, 6], [5, 6]), ([5, 6], [5, 6])],
]


def _mask_of(lengths, causal=True, apart=True):
    text = torch.cat([torch.full((n,), k) for k, n in enumerate(lengths)])
    seen = text[:, None] == text if apart else torch.ones(len(text), len(text)).bool()
    return seen & torch.ones(len(text), len(text)).tril().bool() if causal else seen


def pack(answer):
    """Check a function [(ids, labels), ...] -> ids, labels, positions, mask."""
    for rows in _PACKED:
        before = [(list(ids), list(labels)) for ids, labels in rows]
        got = answer(rows)
        if rows != before:
            raise Mistake("The rows that were passed in have been changed.")
        if not isinstance(got, (tuple, list)) or len(got) != 4:
            raise Mistake("Return four tensors: ids, labels, positions and the mask.")
        lengths = [len(ids) for ids, _ in rows]
        total = sum(lengths)
        for what, tensor in zip(("ids", "labels", "positions"), got, strict=False):
            if not isinstance(tensor, torch.Tensor) or tensor.shape != (1, total):
                shape = tuple(getattr(tensor, "shape", ()))
                raise Mistake(f"The {what} have the shape {shape}, not (1, {total}).")
            if tensor.dtype != torch.int64:
                raise Mistake(f"The {what} are {tensor.dtype}, not torch.int64.")
        ids, labels, positions, mask = got
        if ids[0].tolist() != [i for row, _ in rows for i in row]:
            raise Mistake("The ids are not those of the texts one after another.")
        _labels(labels[0].tolist(), rows)
        _positions(positions[0].tolist(), lengths)
        _mask(mask, lengths, equal=rows[0] == rows[1])


def _labels(labels, rows):
    given = [i for _, row in rows for i in row]
    right = [i for _, row in rows for i in [-100, *row[1:]]]
    if labels[1:] == right[1:] and labels[0] in (-100, given[0]):
        return
    if labels == given:
        raise Mistake(
            "The last token of one text is trained to predict the first of the next: that label is "
            "still there."
        )
    if labels == [i for _, row in rows for i in [*row[:-1], -100]]:
        raise Mistake("The last label of each text is masked, which is predicted from inside it.")
    if labels == [-100, *given[1:]]:
        raise Mistake("Only the first text's first label is masked; the later texts have one too.")
    if labels == [i for _, row in rows for i in [*row[1:], -100]]:
        raise Mistake("The labels are shifted already; the model does that itself.")
    raise Mistake(f"The labels are {labels}; they were {given} before packing.")


def _positions(positions, lengths):
    if positions == list(range(len(positions))):
        raise Mistake("The positions run on over the texts; each text begins at 0.")
    if positions == [i + 1 for n in lengths for i in range(n)]:
        raise Mistake("The positions begin at 1, not at 0.")
    if positions == [k for k, n in enumerate(lengths) for _ in range(n)]:
        raise Mistake("The positions are the numbers of the texts; count inside each text.")
    if positions != [i for n in lengths for i in range(n)]:
        raise Mistake(f"The positions are {positions} for texts of {lengths} tokens.")


def _mask(mask, lengths, equal):
    total = sum(lengths)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise Mistake("The mask is not boolean; other numbers would be added to the scores.")
    if mask.shape != (1, 1, total, total):
        raise Mistake(f"The mask has the shape {tuple(mask.shape)}, not (1, 1, {total}, {total}).")
    mask, right = mask[0, 0], _mask_of(lengths)
    if torch.equal(mask, right):
        return
    if torch.equal(mask, ~right):
        raise Mistake("The mask is inverted: True must stand where a token is seen.")
    if torch.equal(mask, right.T):
        raise Mistake("The mask is transposed: rows of the matrix are the tokens that look.")
    if torch.equal(mask, _mask_of(lengths, apart=False)):
        if equal:
            raise Mistake(
                "Two texts that are equal are taken for one, so the second sees the first."
            )
        raise Mistake("A token sees the texts before its own.")
    if torch.equal(mask, _mask_of(lengths, causal=False)):
        raise Mistake("A token sees what comes after it in its text.")
    if not mask.diagonal().all():
        raise Mistake("A token does not see itself.")
    raise Mistake(f"{int((mask != right).sum())} entries of the mask are wrong.")
