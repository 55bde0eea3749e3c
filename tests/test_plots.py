"""Plots of a run: what has no data is not drawn, what is drawn lies within its frame, equal data give equal files."""

from llm_alignment import plots


def test_plots_are_equal_files_for_equal_data_and_nothing_is_drawn_without(tmp_path):
    after = {"avg": 5.0, "by_category": {"math": 5.0, "язык": 7.0}, "n": 8}
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]
    for name in ("a", "b"):
        plots.save_figure(plots.plot_categories("MT-Bench", None, after), tmp_path / f"categories_{name}.png")
        plots.save_figure(plots.plot_curves("x", {"": history}, plots.LOSS), tmp_path / f"curve_{name}.png")
        plots.save_figure(plots.plot_curves("x", {"": history}, plots.KL), tmp_path / "empty.png")
    for kind in ("categories", "curve"):
        first, second = ((tmp_path / f"{kind}_{name}.png").read_bytes() for name in "ab")
        assert first == second and first.startswith(b"\x89PNG")
    assert not (tmp_path / "empty.png").exists()


def test_both_losses_of_every_run_and_the_means_with_their_interval_are_in_the_figure():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}]
    (axis,) = plots.plot_curves("x", {"a": history, "b": history[:1]}, plots.LOSS | plots.KL).axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[2.0, 1.0], [1.5], [2.0]]
    record = {"baseline": {"val_loss": 3.0}, "final": {"val_loss": 0.5}, "kept_step": 2}
    (axis,) = plots.plot_curves("x", {"": plots.with_validation(history, record)}, plots.LOSS).axes
    assert list(axis.lines[1].get_xydata().ravel()) == [0, 3.0, 2, 0.5] and axis.lines[1].get_linestyle() == "None"
    before, after = ({"avg": avg, "by_category": {"math": avg}, "n": 8} for avg in (5.0, 6.5))
    delta = {"mean": 1.5, "low": 0.25, "high": 2.75, "n": 8}
    title = plots.plot_categories("MT-Bench", before, after, delta).get_suptitle()
    assert all(figure in title for figure in ("5.00", "6.50", "+1.50", "0.25", "2.75", "8"))
