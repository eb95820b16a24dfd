"""The model side: tokenizers, chat rendering with token types, and backends that turn tokens into residuals."""
