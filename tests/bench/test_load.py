"""The benchmark of loading writes a model, reads it and reports; and refuses what says nothing."""

import json

import pytest

from milora_jax.commands.bench import main
from milora_jax.errors import UserError


@pytest.mark.slow
def test_a_report_has_every_figure(capsys, tmp_path):
    main(["load", "--shape", "llama-30m", "--layers", "1", "--repeats", "5", "--scratch", str(tmp_path)])
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == 1
    assert report["bytes"] > 8e6
    assert report["share_of_disk"] == pytest.approx(
        report["load_bytes_per_second"] / report["disk_bytes_per_second"]
    )
    assert report["share_of_keep"] == pytest.approx(
        report["load_bytes_per_second"] / report["keep_bytes_per_second"]
    )
    assert report["peak_bytes_over_file_bytes"] > 0.5
    assert not list(tmp_path.iterdir()), "the files are taken away again"


def test_what_says_nothing_is_refused():
    with pytest.raises(UserError, match="--repeats is 4: expected at least 5"):
        main(["load", "--repeats", "4"])
    with pytest.raises(UserError, match="--shape is 'llama'"):
        main(["load", "--shape", "llama"])
