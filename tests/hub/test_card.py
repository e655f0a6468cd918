"""The model card says what the checkpoint is and how to open it."""

from huggingface_hub import ModelCard

from compresskit.hub import model_card

ROWS = [("ratio", "19.0 x"), ("parameters", "5,700,000")]


def test_everything_is_on_the_card() -> None:
    text = model_card(
        "me/small-bert",
        ROWS,
        architecture="AutoModelForMaskedLM",
        base_model="google-bert/bert-base-uncased",
        tags=["kronecker", "compresskit"],
        left_dense=[("classifier", "fewer than 16 rows | or columns")],
    )
    card = ModelCard(text, ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "base_model": "google-bert/bert-base-uncased",
        "library_name": "compresskit",
        "tags": ["compresskit", "kronecker"],
    }
    assert "\nimport compresskit\nfrom transformers import AutoModelForMaskedLM\n" in text
    assert 'AutoModelForMaskedLM.from_pretrained("me/small-bert")' in text
    assert "| ratio | 19.0 x |\n| parameters | 5,700,000 |" in text
    assert "| classifier | fewer than 16 rows \\| or columns |" in text


def test_what_is_not_known_is_left_out() -> None:
    text = model_card("small", [])
    assert "base_model" not in text
    assert "None" not in text
    assert "## Numbers" not in text
    assert "## Left" not in text
    assert ModelCard(text).data.library_name == "compresskit"
