"""How well a model predicts the words of plain text: the next ones, or masked ones.

Text is cut into windows of `max_length` tokens that do not overlap, documents one after the other with an empty line
between them. Masked words (15 %; BERT, Devlin et al. 2019, section 3.1) are the same for every model with the same
tokenizer; what is measured of them is no perplexity of the text. Data: WikiText-2, Merity et al., ICLR 2017.
"""

from compresskit.tasks.task import HubSource, Task, register_task

register_task(
    Task(
        name="perplexity",
        kind="language-modelling",
        text_columns=(("text", "sentence", "content"),),
        label_column=(),
        hub=HubSource("Salesforce/wikitext", "wikitext-2-raw-v1"),
        folders=("wikitext2", "wikitext"),
        max_length=512,
    )
)
