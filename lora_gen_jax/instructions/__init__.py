"""Tasks from instruction rows: a language model behind an endpoint separates what the task is from a row's particulars.

In: Alpaca's rows. Out: a file for `data.files` in which rows with the same abstract instruction are one task.

    rows        what is read, and what is written for each row
    prompt      what the endpoint is asked
    replies     what it answered, and what is wrong with that
    settings    where requests go, and with which key
    endpoint    the HTTP side: retries, fallbacks and errors
    asking      rows to outcomes, several requests at a time
    partial     finished rows, kept for the same command to go on
    command     `lora-gen instructions`
"""
