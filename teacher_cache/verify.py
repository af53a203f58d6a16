"""Is a cache whole and unaltered?"""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from teacher_cache.layout import Layout, file_record, read_commit, read_spec, shard_numbers


def verify_cache(root: Path) -> list[str]:
    """Checks every file of a cache against its commit record and the plan.

    Reads every byte: sizes and SHA-256 of all files, and that every planned utterance is in its shard exactly once.

    Returns:
        One sentence per problem, naming the file; empty for a sound cache.

    Raises:
        CacheError: there is no cache at ``root`` or its ``cache.json`` can't be trusted.
    """
    spec = read_spec(root)
    layout = Layout(root)
    problems: list[str] = []
    plan = pq.read_table(layout.plan, columns=["id", "shard"])
    planned: dict[int, list[str]] = {shard: [] for shard in shard_numbers(plan)}
    for utterance_id, shard in zip(plan["id"].to_pylist(), plan["shard"].to_pylist(), strict=True):
        planned[shard].append(utterance_id)
    for shard, ids in planned.items():
        if not layout.is_committed(shard):
            problems.append(f"shard {shard} is not finished")
            continue
        commit = read_commit(layout, shard)
        if commit["fingerprint"] != spec.fingerprint:
            problems.append(f"{layout.commit(shard)} belongs to another cache")
        for path in layout.files(shard, spec.masks.draws):
            committed = commit["files"].get(str(path.relative_to(root)))
            if committed is None or not path.is_file():
                problems.append(f"{path} is missing")
                continue
            if file_record(path, committed["rows"]) != committed:
                problems.append(f"{path} is not as committed (size or SHA-256 differ)")
                continue
            found = pq.read_table(path, columns=["id"])["id"].to_pylist()
            if found != ids:
                lost = sorted(set(ids) - set(found))
                twice = sorted(name for name, count in Counter(found).items() if count > 1)
                problems.append(f"{path} holds other utterances than planned (missing {lost[:3]}, twice {twice[:3]})")
    expected = {path for shard in planned for path in layout.files(shard, spec.masks.draws)}
    problems += [
        f"{path} does not belong to the cache"
        for path in sorted(root.rglob("*.parquet"))
        if path not in expected | {layout.plan}
    ]
    return problems
