# shellcheck shell=bash
# What differs between clusters: slurm/site.env, or the file that $EAOPD_SITE names (see site.env.example). An EAOPD_*
# variable that is set when the job is submitted wins over the file.
#
# Sets $python, $in_container (what stands before a command on this node), $container (srun's options for it).

read_site() {
    local file="${EAOPD_SITE:-$root/slurm/site.env}" given
    if [[ ! -r $file ]]; then
        [[ -z ${EAOPD_SITE:-} ]] || finish 1 "error: EAOPD_SITE is $file, which cannot be read"
        return 0
    fi
    given="$(export -p | grep -E '^declare -x EAOPD_' | sed 's/^declare -x/declare -gx/')"
    set -a
    # shellcheck disable=SC1090  # the site's
    source "$file"
    set +a
    eval "$given"
}

prepare_site() {
    read_site
    if [[ -n ${EAOPD_MODULES:-} ]]; then
        # shellcheck disable=SC2086  # a list of words
        module load $EAOPD_MODULES || finish 1 "error: EAOPD_MODULES: 'module load $EAOPD_MODULES' failed"
    fi
    [[ -z ${EAOPD_SHARED:-} || -d $EAOPD_SHARED ]] ||
        finish 1 "error: EAOPD_SHARED is $EAOPD_SHARED, which is not a folder on ${SLURMD_NODENAME:-$HOSTNAME}"
    choose_container
    if [[ -n ${EAOPD_INTERFACE:-} ]]; then
        export NCCL_SOCKET_IFNAME="$EAOPD_INTERFACE" GLOO_SOCKET_IFNAME="$EAOPD_INTERFACE"
    fi
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
}

choose_container() {
    local mounts
    container=() in_container=()
    python="${EAOPD_VENV:-$root/.venv}/bin/python"
    case "${EAOPD_CONTAINER:=none}" in
    none)
        [[ -x $python ]] || finish 1 "error: $python is not there: make the environment \
(slurm/container/README.md), or set EAOPD_VENV to its folder or EAOPD_CONTAINER to pyxis or apptainer"
        return 0
        ;;
    pyxis | apptainer) ;;
    *) finish 1 "error: EAOPD_CONTAINER is $EAOPD_CONTAINER; allowed: none, pyxis, apptainer" ;;
    esac
    [[ -n ${EAOPD_IMAGE:-} ]] || finish 1 "error: EAOPD_CONTAINER is $EAOPD_CONTAINER and EAOPD_IMAGE is not set"
    [[ $EAOPD_IMAGE != /* || -e $EAOPD_IMAGE ]] ||
        finish 1 "error: EAOPD_IMAGE is $EAOPD_IMAGE, which is not there: build it (slurm/container/README.md)"
    [[ -n ${EAOPD_VENV:-} ]] || python=python3
    mounts="$(container_mounts)"
    if [[ $EAOPD_CONTAINER == pyxis ]]; then
        container=("--container-image=$EAOPD_IMAGE" "--container-mounts=$mounts" "--container-workdir=$root")
    else
        command -v apptainer >/dev/null || finish 1 "error: EAOPD_CONTAINER is apptainer, which is not on the PATH"
        in_container=(apptainer exec --nv --bind "$mounts" --pwd "$root" "$EAOPD_IMAGE")
    fi
}

# The checkout, the site's folders, and EAOPD_MOUNTS, each at its own place.
container_mounts() {
    local place mounts="$root:$root"
    for place in "${EAOPD_SHARED:-}" "${EAOPD_MODELS:-}" "${EAOPD_STAGE:-}" "${HF_HOME:-}"; do
        [[ -z $place ]] || mounts+=",$place:$place"
    done
    echo "$mounts${EAOPD_MOUNTS:+,$EAOPD_MOUNTS}"
}
