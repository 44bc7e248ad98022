"""Text -> tokens and loss mask: the chat template, and the wording of exam questions and retrieved passages."""
