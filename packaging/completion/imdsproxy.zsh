#compdef imdsproxy

_imdsproxy_completion() {
  eval $(env _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" _IMDSPROXY_COMPLETE=complete_zsh imdsproxy)
}

compdef _imdsproxy_completion imdsproxy
