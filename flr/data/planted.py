"""A generated data set with planted interests, whose true factors are known.

Catalogue: every item belongs to one interest and, in it, to a series: "Amber Chess 3" is volume 3 of the series "Amber
Chess". An interest's items form a ring: each volume is followed by the next, a series' last by the next series' first.

Users have a few interests with a weight each, and a place in the ring of each. An event first chooses the interest:
with probability ``stay`` that of the user's last event; else the one that has waited longest with probability
``rotation``, else by weight. Then it chooses the item: with probability ``follow`` the one after the user's last item
*of that interest*, else any item of the interest, low places in the ring more often.

So histories interleave several chains. The last item alone says little: to predict, a model has to see when each
interest was last served (which interest is due) and to recall the last item of each, which may lie many places back,
and its best answer is a mixture of one continuation an interest. The report gives the two shares that bound what is
possible.
"""

from __future__ import annotations

import numpy as np

from .augment import uniforms
from .catalogue import Catalogue
from .csr import latest, places_within, user_bounds
from .interactions import Interactions, RecDataset
from .report import ReadReport
from .splits import time_cuts

_NOUN_TEXT = (
    "Jazz Chess Garden Ocean Robot Kitchen Mystery Mountain Theatre Camera Horse Dragon Bicycle Planet Poetry "
    "Football Castle Forest Opera Sewing Railway Puppet Coffee Desert"
)
_ADJECTIVE_TEXT = (
    "Amber Brave Calm Daring Early Faded Gentle Hidden Inner Jolly Keen Lonely Mellow Narrow Open Proud Quiet Rapid "
    "Silent Tender Urban Vivid Warm Young Bitter Clever Distant Eager Frozen Golden Humble Ivory Little Modern Noble "
    "Olive Plain Royal Simple Wild"
)
_NOUNS, _ADJECTIVES = _NOUN_TEXT.split(), _ADJECTIVE_TEXT.split()
_STREAM_NAMES = ("items", "interests", "users", "start", "which", "what", "time")
_STREAMS = {name: 16 + place for place, name in enumerate(_STREAM_NAMES)}
_DAY = 86400
_SPAN = 1000  # days in which users begin
_EPOCH = 1_500_000_000  # time of the first possible event, seconds since 1970


def planted_dataset(
    num_items: int = 500,
    num_users: int = 2000,
    num_interests: int = 4,
    *,
    interests_per_user: int = 3,
    follow: float = 0.9,
    rotation: float = 0.6,
    stay: float = 0.0,
    series_length: int = 5,
    min_events: int = 6,
    max_events: int = 14,
    max_history: int = 10,
    split: str = "user",
    seed: int = 0,
) -> RecDataset:
    """Generate a data set with planted interests (see the module's text for how).

    Args:
        num_items: at least num_interests * 2.
        num_users: at least 10.
        num_interests: of the catalogue.
        interests_per_user: interests that a user mixes, at most num_interests.
        follow: probability that an event continues its interest's chain, 0..1.
        rotation: probability that an event that does not stay serves the interest that has waited longest, 0..1.
        stay: probability that an event stays with the interest of the user's last event, 0..1; higher values make
            bursts, so that the other interests' last items lie further back.
        series_length: volumes a series.
        min_events, max_events: events a user, uniform, both included; at least 2.
        max_history: items of a history.
        split: "user" (all rows of a user in one part, 8:1:1) or "time" (rows 8:1:1 by time).
        seed: equal arguments give an equal data set on every machine; a user's events do not depend on num_users.

    Returns:
        RecDataset. ``catalogue.attributes`` (int64 [C] each): "interest" 0..num_interests - 1, "series", "volume" (from
        1) and "successor" (index of the item that follows in the interest's ring). ``catalogue.sids``: three codes, of
        which the first goes with the interest for about four series in five, the second numbers the series and the
        third is the volume.

    Example:
        >>> dataset = planted_dataset(num_items=40, num_users=100, seed=1)
        >>> dataset
        RecDataset('planted': 40 items; 682 train, 78 valid, 93 test rows)
        >>> item = dataset.catalogue.find("Brave Jazz 1")[0]
        >>> dataset.catalogue.titles[dataset.catalogue.attributes["successor"][item]]
        'Brave Jazz 2'
    """
    for name, value, low in (
        ("num_interests", num_interests, 1),
        ("num_items", num_items, 2 * num_interests),
        ("num_users", num_users, 10),
        ("series_length", series_length, 1),
        ("min_events", min_events, 2),
        ("max_events", max_events, min_events),
        ("max_history", max_history, 1),
    ):
        if value < low:
            raise ValueError(f"{name}: expected at least {low}, got {value}")
    if not 1 <= interests_per_user <= num_interests:
        raise ValueError(f"interests_per_user: expected 1..{num_interests} (num_interests), got {interests_per_user}")
    for name, share in (("follow", follow), ("rotation", rotation), ("stay", stay)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected 0..1, got {share}")
    if split not in ("user", "time"):
        raise ValueError(f"split: expected 'user' or 'time', got {split!r}")
    catalogue, rings = _catalogue(num_items, num_interests, series_length, seed)
    chances = (follow, rotation, stay)
    lengths, events = _events(rings, num_users, interests_per_user, chances, min_events, max_events, seed)
    users = np.repeat(np.arange(num_users), lengths)
    items = events[np.arange(max_events) < lengths[:, None]]
    start, _ = user_bounds(users)
    place = np.arange(len(users))
    times = _times(users, place - start, seed)
    rows = place[place > start]
    if split == "time":
        rows = rows[np.argsort(times[rows], kind="stable")]
        cuts = time_cuts(times[rows], (0.8, 0.9))
    else:
        cuts = np.searchsorted(users[rows], [num_users * 8 // 10, num_users * 9 // 10]).tolist()
    parts: list[Interactions] = []
    for chosen in np.split(rows, cuts):
        names = [f"user_{user}" for user in users[chosen].tolist()]
        histories = latest(items, start, chosen, max_history)
        parts.append(Interactions(names, histories, items[chosen], times[chosen]))
    report = ReadReport("planted_dataset", len(users), len(users), 0, num_users, num_items)
    report.notes.extend(_bounds(catalogue, parts[2]))
    return RecDataset(catalogue, parts[0], parts[1], parts[2], "planted", report)


def _key(seed: int) -> np.ndarray:
    return np.array([seed % 2**64], np.uint64)


def _user_keys(users: np.ndarray, seed: int) -> np.ndarray:
    return users.astype(np.uint64) * np.uint64(0xD1342543DE82EF95) + _key(seed)


def _catalogue(num_items: int, num_interests: int, series_length: int, seed: int) -> tuple[Catalogue, list[np.ndarray]]:
    """The catalogue and, for every interest, its ring: item indices in order of succession."""
    order = np.argsort(uniforms(_key(seed), _STREAMS["items"], num_items)[0], kind="stable")  # indices tell nothing
    rings = [part.astype(np.int32) for part in np.array_split(order, num_interests)]
    interest, series, volume, successor = (np.zeros(num_items, np.int64) for _ in range(4))
    first_series = 0
    for number, ring in enumerate(rings):
        place = np.arange(len(ring))
        interest[ring] = number
        series[ring] = first_series + place // series_length
        volume[ring] = 1 + place % series_length
        successor[ring] = np.roll(ring, -1)
        first_series = int(series[ring].max()) + 1
    of_series = np.zeros(first_series, np.int64)
    of_series[series] = interest
    begins = np.searchsorted(of_series, np.arange(num_interests))  # first series of every interest
    topics = enumerate(of_series.tolist())
    names = [f"{_adjectives(number - int(begins[topic]))} {_noun(topic)}" for number, topic in topics]
    strays, other = uniforms(_key(seed), _STREAMS["interests"], 2 * first_series).reshape(2, first_series)
    coarse = np.where(strays < 0.8, of_series, (other * num_interests).astype(np.int64))
    fine = np.empty(first_series, np.int64)
    fine[np.argsort(coarse, kind="stable")] = places_within(np.bincount(coarse, minlength=num_interests))
    pairs = list(zip(series.tolist(), volume.tolist(), strict=True))
    catalogue = Catalogue(
        [f"item_{index}" for index in range(num_items)],
        [f"{names[number]} {part}" for number, part in pairs],
        [(f"<a_{coarse[number]}>", f"<b_{fine[number]}>", f"<c_{part}>") for number, part in pairs],
        {"interest": interest, "series": series, "volume": volume, "successor": successor},
    )
    return catalogue, rings


def _adjectives(number: int) -> str:
    words = [_ADJECTIVES[number % len(_ADJECTIVES)]]
    while number := number // len(_ADJECTIVES):
        words.append(_ADJECTIVES[number % len(_ADJECTIVES)])
    return " ".join(words)


def _noun(interest: int) -> str:
    again, place = divmod(interest, len(_NOUNS))
    return _NOUNS[place] + (f"-{again + 1}" if again else "")


def _events(
    rings: list[np.ndarray],
    num_users: int,
    interests_per_user: int,
    chances: tuple[float, float, float],
    min_events: int,
    max_events: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Number of events int64 [U] and item of every event int32 [U, max_events] (past the number: unused).

    ``chances``: the probabilities follow, rotation and stay.
    """
    users = _user_keys(np.arange(num_users), seed)
    slots, (follow, rotation, stay) = interests_per_user, chances
    draws = uniforms(users, _STREAMS["users"], len(rings) + slots + 1)
    interests = np.argsort(draws[:, : len(rings)], axis=1, kind="stable")[:, :slots]  # [U, slots]
    weights = np.cumsum(-np.log1p(-draws[:, len(rings) : -1]), axis=1)  # exponentials: a uniform mix once divided
    weights /= weights[:, -1:]
    lengths = min_events + (draws[:, -1] * (max_events - min_events + 1)).astype(np.int64)
    sizes = np.array([len(ring) for ring in rings])[interests]  # [U, slots]
    bases = np.cumsum([0, *map(len, rings[:-1])])[interests]
    joined = np.concatenate(rings)
    begin = uniforms(users, _STREAMS["start"], 2 * slots)
    place = (begin[:, :slots] ** 2 * sizes).astype(np.int64) - 1  # one before the first item, which "follows" it
    waiting = begin[:, slots:].copy()  # steps since an interest was served; at the beginning a random order
    which = uniforms(users, _STREAMS["which"], 3 * max_events).reshape(num_users, max_events, 3)
    what = uniforms(users, _STREAMS["what"], 2 * max_events).reshape(num_users, max_events, 2)
    rows = np.arange(num_users)
    slot = np.zeros(num_users, np.int64)
    events = np.empty((num_users, max_events), np.int32)
    for step in range(max_events):
        drawn = (which[:, step, :1] >= weights).sum(axis=1).clip(max=slots - 1)
        moved = np.where(which[:, step, 1] < rotation, waiting.argmax(axis=1), drawn)
        slot = np.where((which[:, step, 2] < stay) & (step > 0), slot, moved)
        size = sizes[rows, slot]
        anywhere = (what[:, step, 0] ** 2 * size).astype(np.int64)
        now = np.where(what[:, step, 1] < follow, (place[rows, slot] + 1) % size, anywhere)
        place[rows, slot] = now
        events[:, step] = joined[bases[rows, slot] + now]
        waiting += 1
        waiting[rows, slot] = 0
    return lengths, events


def _times(users: np.ndarray, step: np.ndarray, seed: int) -> np.ndarray:
    """Seconds, int64 [n], ascending for a user: a beginning in the span, then an event every one to three days."""
    keys = _user_keys(users, seed)
    begin = (uniforms(keys, _STREAMS["time"], 1)[:, 0] * _SPAN * _DAY).astype(np.int64)
    keys += step.astype(np.uint64) << np.uint64(48)
    jitter = (uniforms(keys, _STREAMS["time"] + 1, 1)[:, 0] * _DAY).astype(np.int64)
    return _EPOCH + begin + 2 * _DAY * step + jitter


def _bounds(catalogue: Catalogue, rows: Interactions) -> list[str]:
    """What can be predicted of ``rows``: targets that follow their interest's last item, and the history's last."""
    if len(rows) == 0:
        return []
    interest, successor = catalogue.attributes["interest"], catalogue.attributes["successor"]
    values, offsets = rows.histories
    row = np.repeat(np.arange(len(rows)), rows.histories.lengths)
    same = np.flatnonzero(interest[values] == interest[rows.targets][row])
    latest = np.full(len(rows), -1, np.int64)
    np.maximum.at(latest, row[same], same)
    known = latest >= 0
    continues = np.zeros(len(rows), bool)
    continues[known] = successor[values[latest[known]]] == rows.targets[known]
    at_end = successor[values[offsets[1:] - 1]] == rows.targets
    return [
        f"{100 * continues.mean():.0f} % of the test targets continue the history's last item of their interest",
        f"{100 * at_end.mean():.0f} % continue the history's last item",
    ]
