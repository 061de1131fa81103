# Sourced by run_all.sh: how it runs a command, what it remembers of one, and how it stops.
fail() { echo "run_all.sh: error: $*" >&2; exit 2; }
trap 'code=$?; echo "run_all.sh: error: line $LINENO of ${BASH_SOURCE[0]} ended with $code" >&2
    exit "$code"' ERR

child=
stop() {  # SIGNAL CODE: end the command that runs, then the script
    trap '' INT TERM HUP
    if [ -n "$child" ]; then
        kill -- "-$child" 2>/dev/null || :
        wait "$child" || :
    fi
    printf '\nrun_all.sh: stopped by %s. The same command resumes\n' "$1" >&2  # below a progress bar
    exit "$2"
}
trap 'stop SIGINT 130' INT
trap 'stop SIGTERM 143' TERM
trap 'stop SIGHUP 129' HUP

run() {  # COMMAND...: run it in a process group of its own, so that a signal ends all of it
    local code=0
    echo "+ $*"
    set -m
    "$@" &
    child=$!
    set +m
    wait "$child" || code=$?
    child=
    if [ "$code" != 0 ]; then
        echo "run_all.sh: error: $1 $2 ended with $code" >&2
        exit "$code"
    fi
}

# stage OUTPUT INPUT... -- COMMAND...: make OUTPUT, unless the same command made it from the same
# inputs. A stamp beside OUTPUT, written before the command starts, says which those were.
stage() {
    local output=$1 stamp=$1.made-by checkpoint=${1%/model}/checkpoint key inputs=()
    shift
    while [ "$1" != -- ]; do
        inputs+=("$1")
        shift
    done
    shift
    key=$({ printf '%s\n' "$@" "${model_sha256:-}"
        cat "$2" requirements.txt "${inputs[@]}"; } | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        if [ -e "$output" ] || [ -e "$checkpoint" ]; then
            # Only what has a stamp is deleted, and in the paper profile, where it may have taken
            # days, not even that.
            [ -e "$stamp" ] || fail "run_all.sh did not make $output. Move it away, or set RUNS"
            [ "$PROFILE" = embedded ] ||
                fail "$output was made with other settings or inputs. Set RUNS, or delete it"
        fi
        rm -rf "$output" "$checkpoint"
        mkdir -p "$(dirname "$output")"
        echo "$key" > "$stamp"
    fi
    if [ -e "$output" ]; then
        echo "done before: $output"
        return
    fi
    if [ -e "$checkpoint" ]; then set -- "$@" --resume; fi
    run "$@"
    [ -e "$output" ] || fail "$1 $2 did not make $output"
}
